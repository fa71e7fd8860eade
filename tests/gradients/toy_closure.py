"""Closures over closed forms, so that a source can be tested without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qaft.gradients.base import Direction, PairedLosses

Loss = Callable[[Mapping[str, Tensor]], Tensor]
"""Values of the parameters by name -> losses of the examples, [N]."""


@dataclass
class ToyClosure:
    """``qaft.gradients.base.Closure`` of one process over a function of the parameters, by moving them."""

    params: Mapping[str, nn.Parameter]
    losses: Loss
    step: int = 0
    run_seed: int = 0
    is_last: bool = True
    rank: int = 0
    world_size: int = 1
    targets: Sequence[int] = ()
    probes: list[tuple[Sequence[Direction], float]] = field(default_factory=list)

    def __call__(self) -> Tensor:
        return self.losses(self.params).mean()

    def at(self, direction: Direction, step: float) -> Tensor:
        moved = {n: p.detach() + step * direction[n] if n in direction else p.detach() for n, p in self.params.items()}
        return self.losses(moved).detach().double()

    def pair(self, directions: Sequence[Direction], epsilon: float) -> PairedLosses:
        self.probes.append(([{n: v.clone() for n, v in d.items()} for d in directions], epsilon))
        plus, minus = ([self.at(d, sign * epsilon) for d in directions] for sign in (1, -1))
        count = len(plus[0])
        targets = torch.tensor(self.targets or [1] * count)
        # Every direction probes all examples: as many groups of examples as there are directions.
        return PairedLosses(
            torch.cat(plus),
            torch.cat(minus),
            targets.repeat(len(directions)),
            torch.arange(len(directions)).repeat_interleave(count),
        )

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        return [list(values)]


def blocks(
    layers: Mapping[str, int], rank: int, count: int, dtype: torch.dtype = torch.float64
) -> dict[str, nn.Parameter]:
    """Zero blocks of a bank for layers of the given output widths, named as in a model."""
    return {
        f"{layer}.update.blocks.{p}": nn.Parameter(torch.zeros(rows, rank, dtype=dtype))
        for layer, rows in layers.items()
        for p in range(count)
    }
