"""The entries of each weight with the largest gradient of the loss, without ever holding the model's gradient.

    dL/dW = sum over batches and tokens of g^T x,     x the layer's input, g the gradient of its output

Only activation gradients are back-propagated, so packed layers are ranked like others. The sums are held in fp32 for
as many layers as fit into a fixed number of entries; the batches are run again for the next ones. The choice is that of
the whole gradient, exactly.

Source: SIFT (arXiv 2312.11875), which takes the first batches of the training data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from qaft.bases.base import FrozenLinear
from qaft.updates.entries import EntryChoice

HELD_ENTRIES = 2**28
"""Gradient entries that are summed at a time: 1 GiB; all linear layers of 7B need 25 rounds, q and v alone 4."""


def largest_gradients(
    layers: Mapping[str, FrozenLinear],
    choice: EntryChoice,
    batches: Callable[[], Iterable[object]],
    loss: Callable[[object], Tensor],
    *,
    held_entries: int = HELD_ENTRIES,
) -> dict[str, Tensor]:
    """Return the chosen places of each layer, see ``EntryChoice.largest``.

    Args:
        layers: name -> layer of a model whose parameters are all frozen; hooked for the duration of the call only.
        choice: how many entries, in what blocks.
        batches: returns the same calibration batches whenever it is called.
        loss: the scalar loss of the model on one batch.
        held_entries: gradient entries in memory; a larger weight is held all the same, alone.
    """
    chosen: dict[str, Tensor] = {}
    for group in _groups(layers, held_entries):
        sums = _summed_gradients(group, batches(), loss)
        chosen |= {name: choice.largest(sums.pop(name)) for name in group}
    return chosen


def _groups(layers: Mapping[str, FrozenLinear], held_entries: int) -> Iterator[dict[str, FrozenLinear]]:
    group, held = {}, 0
    for name, layer in layers.items():
        size = layer.out_features * layer.in_features
        if group and held + size > held_entries:
            yield group
            group, held = {}, 0
        group[name], held = layer, held + size
    if group:
        yield group


def _summed_gradients(
    layers: Mapping[str, FrozenLinear], batches: Iterable[object], loss: Callable[[object], Tensor]
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    with ExitStack() as hooks, torch.enable_grad():
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(_adding_to(sums, name)).remove)
        for batch in batches:
            loss(batch).backward()
    unreached = layers.keys() - sums.keys()
    # A layer that no token went through has no gradient to rank by: all its entries tie.
    return sums | {name: torch.zeros(layers[name].out_features, layers[name].in_features) for name in unreached}


def _adding_to(sums: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def watch(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].detach()
        # Below the first watched layer nothing needs a gradient, so back-propagation starts to be recorded here.
        y = output if output.requires_grad else output.detach().requires_grad_()

        def add(gradient: Tensor) -> None:
            step = gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float()
            sums[name] = sums[name].add_(step) if name in sums else step

        y.register_hook(add)
        return y

    return watch
