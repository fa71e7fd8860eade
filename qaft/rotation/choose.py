"""The lower-level problem: which rotations make quantization cheapest, by numbers measured under both answers.

    minimize over r1 and, in every layer i, r2_i, r3_i, r4_i in {I, H}:
        sum_i  E_qkv(r1) + E_gate(r1) + E_v,o(r1, r2_i) + E_up,down(r1, r4_i) + E_keys(r3_i) + E_values(r2_i)

For a given r1 the layers are independent, and in each of them r2, r3 and r4 are, so the minimum is found exactly: two
values of r1, and for each of them every other rotation by itself. Of two equal errors the one without rotation wins.
The paper compares only all-I with all-H and then picks each place from these two.

Source: RoSTE, arXiv 2502.09003, equation 12 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qaft.rotation.choice import Choice
from qaft.rotation.errors import LinearErrors

Bits = tuple[bool, bool]
"""(R1 is in use, the other rotation that meets this linear is in use)."""


@dataclass(frozen=True)
class LayerErrors:
    """What was measured in one decoder layer.

    Attributes:
        linears: module name -> the errors under each combination of the rotations that it meets.
        beside: module name -> the rotation that it meets beside R1: "values", "down" or "" for none.
        keys: relative errors of the cached keys without and with R3, or None when they are not quantized.
        values: those of the cached values without and with R2.
    """

    linears: Mapping[str, Mapping[Bits, LinearErrors]]
    beside: Mapping[str, str]
    keys: tuple[float, float] | None = None
    values: tuple[float, float] | None = None

    def cost(self, kind: str, residual: bool, beside: bool) -> float:
        """Return the summed delta_y of the linears that meet the rotation ``kind``, and of the cache where it does."""
        names = [name for name, met in self.beside.items() if met == kind]
        total = sum(self.linears[name][residual, beside].delta_y for name in names)
        cache = {"values": self.values, "attention": self.keys}.get(kind)
        return total + (cache[beside] if cache is not None else 0.0)


def choose(layers: Sequence[LayerErrors], available: Choice, *, residual: bool | None = None) -> Choice:
    """Return the available rotations under which the summed error is least.

    Args:
        layers: what was measured, in the order of depth.
        available: True where a rotation may be used.
        residual: R1, where it is decided already.
    """
    residuals = (False, True) if available.residual else (False,)
    if residual is not None:
        residuals = (residual,)
    candidates = [_best_with(layers, available, residual) for residual in residuals]
    return min(candidates, key=lambda choice: total_error(layers, choice))


def total_error(layers: Sequence[LayerErrors], choice: Choice) -> float:
    """Return the summed error of all layers under a choice."""
    return sum(
        layer.cost("", choice.residual, False)
        + layer.cost("values", choice.residual, choice.values[i])
        + layer.cost("attention", choice.residual, choice.attention[i])
        + layer.cost("down", choice.residual, choice.down[i])
        for i, layer in enumerate(layers)
    )


def _best_with(layers: Sequence[LayerErrors], available: Choice, residual: bool) -> Choice:
    def better(kind: str, allowed: Sequence[bool]) -> tuple[bool, ...]:
        return tuple(
            allowed[i] and layer.cost(kind, residual, True) < layer.cost(kind, residual, False)
            for i, layer in enumerate(layers)
        )

    return Choice(
        residual=residual,
        values=better("values", available.values),
        attention=better("attention", available.attention),
        down=better("down", available.down),
    )
