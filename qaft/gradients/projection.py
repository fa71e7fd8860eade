"""The projected gradient of each direction with its standard error, from per-example losses.

    c = sum_i d_i / (2 epsilon N),    d_i = l_i(+) - l_i(-),    N = sum_i n_i targets

    SE(c)^2 = B / (B - 1) sum_i (d_i - n_i sum d / N)^2 / (2 epsilon N)^2        (a ratio of sums over B examples)

    control(c)^2 = sum_i d_i^2 / (2 epsilon N)^2        the mean of c^2 where the signs of the examples are random

Everything follows from sums over examples, in fp64, so that c is the same however the batch is cut into micro-batches.
Examples that agree on a direction make c^2 larger than its control, up to B times; where nothing is learnt they are
equal in the mean over steps. An example whose loss is not finite on either side is left out of every sum, the
normaliser too: the mean over the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qaft.gradients.base import PairedLosses

_FIELDS = 6


@dataclass(frozen=True)
class Projection:
    """One direction's part of a step: sums over its examples."""

    examples: float = 0.0
    targets: float = 0.0
    difference: float = 0.0
    square: float = 0.0
    product: float = 0.0
    targets_square: float = 0.0

    def add(self, *more: float) -> Projection:
        """Return the sums with others added, field by field."""
        return Projection(*(a + b for a, b in zip(self.fields(), more, strict=True)))

    def fields(self) -> tuple[float, ...]:
        """Return the sums in the order of ``Projection(...)``."""
        return self.examples, self.targets, self.difference, self.square, self.product, self.targets_square

    def scalar(self, epsilon: float, all_targets: float) -> float:
        """Return this direction's part of the gradient: its own difference over the targets of all directions."""
        return self.difference / (2 * epsilon * all_targets) if all_targets else 0.0

    def standard_error(self, epsilon: float, all_targets: float) -> float:
        """Return the standard error of ``scalar``; NaN with fewer than two examples."""
        if self.examples < 2 or not self.targets:
            return math.nan
        mean = self.difference / self.targets
        residual = self.square - 2 * mean * self.product + mean**2 * self.targets_square
        return math.sqrt(max(residual, 0.0) * self.examples / (self.examples - 1)) / (2 * epsilon * all_targets)

    def control(self, epsilon: float, all_targets: float) -> float:
        """Return the root mean square of ``scalar`` over random signs of the examples' differences."""
        return math.sqrt(self.square) / (2 * epsilon * all_targets) if all_targets else 0.0


@dataclass(frozen=True)
class StepSums:
    """What a step needs of its micro-batches: a projection for each direction, losses, and examples left out."""

    projections: tuple[Projection, ...]
    loss: float = 0.0
    left_out: float = 0.0

    @classmethod
    def zeros(cls, directions: int) -> StepSums:
        """Return the sums over no example."""
        return cls((Projection(),) * directions)

    def add(self, losses: PairedLosses, own: Sequence[int]) -> StepSums:
        """Return the sums with a micro-batch added.

        Args:
            losses: of this rank's examples.
            own: number of each of its directions among those of the step.
        """
        finite = torch.isfinite(losses.plus) & torch.isfinite(losses.minus)
        projections = list(self.projections)
        for local, number in enumerate(own):
            chosen = finite & (losses.direction == local)
            d, n = (losses.plus - losses.minus)[chosen], losses.targets[chosen].double()
            sums = (float(len(d)), *(float(v.sum()) for v in (n, d, d * d, n * d, n * n)))
            projections[number] = projections[number].add(*sums)
        mean_loss = float((losses.plus + losses.minus)[finite].sum()) / 2
        return StepSums(tuple(projections), self.loss + mean_loss, self.left_out + float((~finite).sum()))

    def flat(self) -> list[float]:
        """Return everything as one list, to be sent to other ranks."""
        return [self.loss, self.left_out, *(value for p in self.projections for value in p.fields())]

    @classmethod
    def over_ranks(cls, rows: Sequence[Sequence[float]]) -> StepSums:
        """Return the sums over all ranks from their ``flat`` lists, added in the order of the ranks."""
        total = [sum(column) for column in zip(*rows, strict=True)]
        fields = total[2:]
        starts = range(0, len(fields), _FIELDS)
        return cls(tuple(Projection(*fields[i : i + _FIELDS]) for i in starts), total[0], total[1])

    @property
    def targets(self) -> float:
        """Targets over all directions."""
        return sum(p.targets for p in self.projections)
