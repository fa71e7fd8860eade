"""Which entries of a weight are trained: the largest, one by one or in blocks along a row.

    entry:    the n = floor(rate O I) + 1 largest |score|
    block64:  the n = floor(rate O I / 64) + 1 blocks of 64 consecutive entries with the largest sum of score^2

Source: SIFT (arXiv 2312.11875) and its code, for n and for |gradient| as the score. The blocks are those of a 4-bit
base, so that a changed entry shares its scale with trained ones only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WIDTHS = {"entry": 1, "block64": 64}
"""Consecutive entries that are chosen together, by the name a recipe uses."""


@dataclass(frozen=True)
class EntryChoice:
    """A part of a weight's entries, as ``width`` consecutive ones at a time.

    Attributes:
        rate: fraction of the entries, in (0, 1].
        width: 1 or 64.
        by: ``gradient`` of the loss, ``magnitude`` of the weight, or ``random``.
    """

    rate: float
    width: int
    by: str

    def count(self, numel: int) -> int:
        """Return n for a weight of ``numel`` entries."""
        return min(int(self.rate * numel / self.width) + 1, numel // self.width)

    def first(self, numel: int) -> Tensor:
        """Return the first n places, int32: as many as a choice has, where which ones does not matter."""
        return torch.arange(self.count(numel), dtype=torch.int32)

    def largest(self, scores: Tensor) -> Tensor:
        """Return the n chosen places of ``scores`` [O, I], ascending, int32; place p starts at entry p * width."""
        places = scores.detach().float().reshape(-1, self.width).square().sum(1)
        return places.topk(self.count(scores.numel()), sorted=False).indices.sort().values.int().cpu()

    def random(self, numel: int, generator: torch.Generator) -> Tensor:
        """Return n places at random, ascending, int32."""
        return torch.randperm(numel // self.width, generator=generator)[: self.count(numel)].sort().values.int()
