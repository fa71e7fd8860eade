"""LoRA, the update everyone compares with.

    W = W0 + s B A,   s = c alpha / rank          (LoRA, arXiv 2106.09685, equation 3; c = spec.input_scale)

Shapes: O = out_features, I = in_features, R = rank.  A [R, I], B [O, R].
"""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaft.bases.base import LinearSpec, Matmul
from qaft.updates.base import LowRankFactors, Update


class LowRank(Update):
    """``y = W0 x + s B A x``; R (O + I) trainables.

    Args:
        spec: the layer to adapt.
        rank: R.
        alpha: s = alpha / rank where no norm is folded into the weight.

    Raises:
        ValueError: rank is not in [1, min(O, I)].
    """

    def __init__(self, spec: LinearSpec, *, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        limit = min(spec.out_features, spec.in_features)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"{spec.name}: rank={rank} must be in [1, {limit}] "
                f"for a [{spec.out_features}, {spec.in_features}] weight"
            )
        self.scale = spec.input_scale * alpha / rank
        # The layer's name is part of the seed, so that a layer starts the same whatever else is adapted.
        generator = torch.Generator().manual_seed(spec.seed ^ zlib.crc32(spec.name.encode()))
        down = torch.empty(rank, spec.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down.to(spec.dtype))
        self.up = nn.Parameter(torch.zeros(spec.out_features, rank, dtype=spec.dtype))

    def forward(self, x: Tensor, base: Matmul) -> Tensor:
        """Return the updated output, [..., I] -> [..., O]."""
        # Scaling the small factor costs R * O products instead of one per output element.
        return base(x) + F.linear(F.linear(x, self.down.to(x.dtype)), (self.scale * self.up).to(x.dtype))

    def merge(self, weight: Tensor) -> Tensor:
        """Return ``W0 + s B A``, [O, I]."""
        return weight + (self.scale * self.up @ self.down).to(weight.dtype)

    def low_rank_factors(self) -> LowRankFactors:
        """Return ``(A, s B)``."""
        return LowRankFactors(down=self.down.detach(), up=(self.scale * self.up).detach())
