"""What the quantizer does to the trained layers while they are trained: a few layers at a time, within a time budget.

    delta_w, delta_x, delta_g   relative errors of weight, inputs, and of the output that comes from the weight
    clip_fraction               weights beyond the range of their grid
    flip_rate                   codes that changed, per optimizer step since the layer was last measured
    changed                     codes that are not those of the base model

A latent whose fractional part is uniform changes its code with probability |dW| / s, so ``sum |dW| / s`` changes are
expected. Where many are and none is found, the latents lie on their own grid and the update has no effect: the dead
zone. Everything is measured on a sample of rows and tokens; the layers take turns.

Source: RoSTE, arXiv 2502.09003, theorem 4.3 (delta_g bounds the plateau of the loss).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qaft.layers.adapted import AdaptedLinear
from qaft.layers.inputs import input_of
from qaft.quant.base import QTensor
from qaft.rotation.errors import linear_errors

ROWS = 32
"""Rows that are measured in a layer, evenly spaced over those that the update has moved."""

TOKENS = 32
"""Inputs of a layer that are kept from the last forward pass."""

DEAD_ZONE = 10.0
"""Expected code changes above which finding none means the dead zone: by chance, one in e^10."""

_CLIPPED = 0.65
"""Distance to the grid, in steps, beyond the range: within it a bf16 scale costs up to 0.62 of a step at 4 bits."""


@dataclass(frozen=True)
class LayerState:
    """What was measured in one layer; fractions lie in [0, 1], None is not known.

    Attributes:
        delta_w: ``||W^ - W||^2 / ||W||^2``.
        clip_fraction: weights beyond the range of their grid.
        changed: codes that differ from those of the base model.
        expected: of how many codes, on average, the update would change if the latents were off the grid.
        delta_x: mean over tokens of ``||x^ - x||^2 / ||x||^2``; None without a sample of inputs.
        delta_g: ``||X^ (W^ - W)^T||^2 / ||X^ W^T||^2``; None without a sample of inputs.
        flip_rate: codes changed per step since the last measurement; None at the first.
    """

    delta_w: float
    clip_fraction: float
    changed: float
    expected: float
    delta_x: float | None = None
    delta_g: float | None = None
    flip_rate: float | None = None


class Diagnostics:
    """Measures quantization-aware layers in turn, as many as a share of the training time allows.

    Args:
        layers: name -> trained layer; those without a quantizer are left out.
        share: of the time between two calls that measuring may take.
        clock: seconds from an arbitrary start.
    """

    def __init__(
        self, layers: Mapping[str, AdaptedLinear], *, share: float = 0.03, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._layers = {name: layer for name, layer in layers.items() if layer.quantizer is not None}
        self._names = list(self._layers)
        self._share = share
        self._clock = clock
        self._budget = 0.0
        self._since = clock()
        self._next = 0
        self._seen: dict[str, _Seen] = {name: _Seen() for name in self._names}
        self._inputs: dict[str, Tensor] = {}
        self._dead: set[str] = set()
        for name, layer in self._layers.items():
            # Before what the layer itself does to its inputs.
            layer.register_forward_pre_hook(self._keep(name), prepend=True)

    @torch.no_grad()
    def measure(self, step: int) -> tuple[dict[str, LayerState], tuple[str, ...]]:
        """Return layer -> what was measured, for the layers whose turn it is, and the names newly in the dead zone.

        Args:
            step: number of the last finished optimizer step.
        """
        begin = self._clock()
        # What was not used is lost, what was overdrawn is not.
        self._budget = min(self._budget, 0.0) + self._share * (begin - self._since)
        states: dict[str, LayerState] = {}
        for _ in self._names:
            if self._budget <= 0:
                break
            name = self._names[self._next]
            self._next = (self._next + 1) % len(self._names)
            state = self._measure(name, step)
            if state is not None:
                states[name] = state
            now = self._clock()
            self._budget -= now - begin
            begin = now
        self._since = begin
        return states, self._newly_dead(states)

    def _measure(self, name: str, step: int) -> LayerState | None:
        """Return the state of a layer, or None when it has diverged: the loop says so at its next step."""
        layer, seen = self._layers[name], self._seen[name]
        assert layer.quantizer is not None
        base = layer.base.dequantize().float()
        latent = layer.update.merge(base)
        rows = seen.rows_of(latent - base)
        latent, base = layer.rotation(latent[rows]), layer.rotation(base[rows])
        if not bool(latent.isfinite().all()):
            return None
        codes, before = layer.quantizer.quantize(latent), layer.quantizer.quantize(base)
        served = codes.dequantize(torch.float32)
        return LayerState(
            delta_w=float((served - latent).square().sum() / latent.square().sum().clamp(min=1e-30)),
            clip_fraction=float(_is_clipped(latent, served, codes).float().mean()),
            changed=float((_named(codes) != _named(before)).float().mean()),
            expected=float(((latent - base).abs() / _steps(latent, before)).mean()),
            flip_rate=seen.flips(_named(codes), step),
            **self._input_errors(name, latent, served),
        )

    def _input_errors(self, name: str, latent: Tensor, served: Tensor) -> dict[str, float]:
        x = self._inputs.pop(name, None)
        if x is None:
            return {}
        layer = self._layers[name]
        online = input_of(layer)
        for turn in (layer.rotation, None if online is None else online.rotation):
            x = x if turn is None else turn(x)
        rounded = x
        for quantize in (layer.act_quantizer, None if online is None else online.quantizer):
            rounded = rounded if quantize is None else quantize(rounded)
        errors = linear_errors(x.float(), latent, weights=lambda _: served, inputs=lambda _: rounded.float())
        return {"delta_x": errors.delta_x, "delta_g": errors.delta_g}

    def _keep(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in self._inputs:
                x = args[0].detach().flatten(0, -2)
                self._inputs[name] = x[:: max(1, len(x) // TOKENS)][:TOKENS].clone()

        return hook

    def _newly_dead(self, states: Mapping[str, LayerState]) -> tuple[str, ...]:
        found = []
        for name, state in states.items():
            weights = self._seen[name].size
            if state.changed == 0 and state.expected * weights > DEAD_ZONE and name not in self._dead:
                found.append(name)
        self._dead.update(found)
        return tuple(found)


class _Seen:
    """The rows of one layer that are measured, and their codes at the last time."""

    def __init__(self) -> None:
        self.size = 0
        self._rows: Tensor | None = None
        self._codes: Tensor | None = None
        self._step = 0

    def rows_of(self, change: Tensor) -> Tensor:
        """Return the rows to measure, fixed as soon as the update has moved some; ``change`` is [O, I]."""
        if self._rows is not None:
            return self._rows
        moved = change.abs().amax(1).nonzero().squeeze(1)
        candidates = moved if len(moved) else torch.arange(len(change), device=change.device)
        rows = candidates[:: max(1, len(candidates) // ROWS)][:ROWS]
        self.size = len(rows) * change.shape[1]
        if len(moved):
            self._rows = rows
        return rows

    def flips(self, codes: Tensor, step: int) -> float | None:
        """Return the share of codes that changed per step since the last call, and remember these."""
        last, steps = self._codes, step - self._step
        self._codes, self._step = (codes, step) if self._rows is not None else (None, step)
        if last is None or steps < 1:
            return None
        return float((codes != last).float().mean()) / steps


def _named(codes: QTensor) -> Tensor:
    """Return the codes, [O, I], or the levels of a code book: two codes may name one level, as FP4's zeros do."""
    return codes.values if codes.codebook is None else codes.codebook[codes.values.int()]


def _steps(like: Tensor, codes: QTensor) -> Tensor:
    """Return the distance between neighbouring levels of each weight, [O, I]; of a code book their mean distance."""
    spacing = 1.0
    if codes.codebook is not None:
        spacing = float(codes.codebook.max() - codes.codebook.min()) / (len(codes.codebook) - 1)
    scale = codes.scale.float().abs() * (1.0 if codes.tensor_scale is None else codes.tensor_scale)
    per_group = like.shape[1] // scale.shape[1]
    return (scale * spacing).repeat_interleave(per_group, dim=1).clamp(min=1e-30)


def _is_clipped(latent: Tensor, served: Tensor, codes: QTensor) -> Tensor:
    """Return where a weight is farther from its level than any level inside the range can be, bool [O, I]."""
    outside = served.abs() < latent.abs()
    if codes.codebook is not None:
        levels = codes.codebook
        largest = _steps(latent, codes) * (len(levels) - 1) / (levels.max() - levels.min()) * levels.abs().max()
        return outside & (latent.abs() > largest * (1 + 1e-3))
    return outside & ((served - latent).abs() > _CLIPPED * _steps(latent, codes))


def as_record(states: Mapping[str, LayerState]) -> dict[str, float]:
    """Return ``quantization/<quantity>/<layer>`` -> value, and the mean over the measured layers without the layer."""
    record: dict[str, float] = {}
    values: dict[str, list[float]] = {}
    for name, state in states.items():
        for quantity, value in asdict(state).items():
            if value is not None and quantity != "expected":
                record[f"quantization/{quantity}/{name}"] = value
                values.setdefault(quantity, []).append(value)
    means = {f"quantization/{quantity}": sum(found) / len(found) for quantity, found in values.items()}
    return means | record


def dead_zone_warning(names: tuple[str, ...]) -> str:
    """Return what to tell about layers whose update has changed no code where many changes were expected."""
    return (
        f"{len(names)} layers: this update cannot change any code, because the latents lie on their own grid; train "
        f"from the 16-bit checkpoint, or on another grid. First: {names[0]}"
    )
