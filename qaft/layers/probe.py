"""Both signs of a zeroth-order probe in one forward pass, beside the layers and after their quantizers.

    y_i  <-  y_i + s_i epsilon D(x_i)^T          s = +1 for the first half of the rows, -1 for the second

D is the derivative of the layer's weight along a direction of its parameters. The parameters and the packed weight stay
as they are, nothing is restored afterwards, and a quantized weight is read (and a trained one quantized) once for both
signs. Through a quantizer this is the probe of the straight-through estimator: a perturbation inside it would measure
which codes flip, not how the loss changes.

Rows are examples: the two halves hold the same ones, and each half may be divided among several directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qaft.bases.base import Matmul
from qaft.errors import ModelError
from qaft.gradients.base import Direction
from qaft.layers.adapted import AdaptedLinear
from qaft.rotation.base import Rotation
from qaft.updates.base import FusesProbe


@contextmanager
def probed(
    layers: Mapping[str, AdaptedLinear], directions: Sequence[Direction], epsilon: float, *, rows: int
) -> Iterator[None]:
    """Run the block with the model probed: its batch must be the same ``rows`` examples twice.

    Args:
        layers: adapted layers by name; parameters are ``<layer>.update.<parameter>``.
        directions: each is given an equal share of the rows, see ``row_shares``.
        epsilon: step along the directions, the same for all layers.
        rows: examples, half of what the model sees.

    Raises:
        ModelError: a layer sees other rows than the model (routed experts), so that signs cannot be told apart.
    """
    shared = _names_of_shared(layers)
    with ExitStack() as hooks:
        for name, layer in layers.items():
            own = [_of_layer(direction, name, shared.get(name, {})) for direction in directions]
            if any(own):
                probe = _Probe(name, own, epsilon, rows)
                if layer.quantizer is None and isinstance(layer.update, FusesProbe):
                    layer.probe = partial(probe.inside, layer.update, layer.base.matmul)
                    hooks.callback(setattr, layer, "probe", None)
                else:
                    hooks.callback(layer.register_forward_hook(probe.beside).remove)
        yield


def _of_layer(direction: Direction, layer: str, shared: Mapping[str, list[str]]) -> dict[str, Tensor]:
    prefix = f"{layer}.update."
    own = {name.removeprefix(prefix): value for name, value in direction.items() if name.startswith(prefix)}
    return own | {leaf: direction[name] for leaf, names in shared.items() for name in names if name in direction}


def _names_of_shared(layers: Mapping[str, AdaptedLinear]) -> dict[str, dict[str, list[str]]]:
    """Return layer -> leaf -> the names of a parameter that tied layers have in common: a model has it under one."""
    members: dict[int, list[tuple[str, str]]] = {}
    for name, layer in layers.items():
        for leaf in layer.update.shared:
            members.setdefault(id(getattr(layer.update, leaf)), []).append((name, leaf))
    found: dict[str, dict[str, list[str]]] = {}
    for tied in members.values():
        names = [f"{name}.update.{leaf}" for name, leaf in tied]
        for name, leaf in tied:
            found.setdefault(name, {})[leaf] = names
    return found


class _Probe:
    """Adds the probe to one layer's output: beside it, or inside a product of its update."""

    def __init__(self, name: str, directions: list[dict[str, Tensor]], epsilon: float, rows: int) -> None:
        self._name = name
        self._directions = directions
        self._epsilon = epsilon
        self._rows = rows

    def inside(self, update: FusesProbe, base: Matmul, x: Tensor) -> Tensor:
        """Return the layer's output without bias."""
        half = self._half(x)
        steps = torch.zeros(len(x), *(1,) * (x.ndim - 2), len(self._directions), dtype=x.dtype, device=x.device)
        for number, parts in enumerate(self._parts(half)):
            for part in parts:
                steps[part, ..., number] = self._epsilon
        steps[half:] *= -1
        return update.forward_probed(x, base, self._directions, steps)

    def beside(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the output of a layer's forward hook."""
        assert isinstance(module, AdaptedLinear)
        x = _multiplied_by_weight(module, args[0])
        half = self._half(x)
        steps = torch.full((len(x), *(1,) * (x.ndim - 1)), self._epsilon, dtype=x.dtype, device=x.device)
        steps[half:] *= -1
        for direction, parts in zip(self._directions, self._parts(half), strict=True):
            for part in parts:
                change = module.update.tangent(x[part], module.base.matmul, direction)
                # One pass over the output: it is as large as what the layer itself writes.
                output[part].addcmul_(change, steps[part])
        return output

    def _half(self, x: Tensor) -> int:
        """Return how many leading indices of x belong to one sign: the examples, or all of their tokens."""
        per_example, rest = divmod(len(x), 2 * self._rows)
        if rest or not per_example or (x.ndim > 2 and per_example != 1):
            raise ModelError(
                f"{self._name}: it sees {len(x)} rows of a batch of 2 x {self._rows}, so the two signs of a probe "
                "cannot be told apart (experts that tokens are routed to); leave it out of select.targets, or set "
                "gradient.kind to backprop"
            )
        return per_example * self._rows

    def _parts(self, half: int) -> Iterator[tuple[slice, ...]]:
        if len(self._directions) == 1:
            yield (slice(None),)
            return
        for share in row_shares(self._rows, len(self._directions)):
            start, stop = share.start * half // self._rows, share.stop * half // self._rows
            yield slice(start, stop), slice(half + start, half + stop)


def row_shares(rows: int, directions: int) -> list[range]:
    """Return which of the rows probe each direction; the shares differ by one row at most."""
    bounds = [rows * index // directions for index in range(directions + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _multiplied_by_weight(layer: AdaptedLinear, x: Tensor) -> Tensor:
    """Return what a change of the layer's weight is multiplied by, in the basis of the update."""
    if layer.quantizer is None:
        return x
    x = layer.act_quantizer(layer.rotation(x))
    return layer.rotation.inverse(x) if isinstance(layer.rotation, Rotation) else x
