"""LoRA, the update everyone compares with.

    W = W0 + s B A,   s = c alpha / rank          (LoRA, arXiv 2106.09685, equation 3; c = spec.input_scale)

Shapes: O = out_features, I = in_features, R = rank.  A [R, I], B [O, R].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaft.bases.base import LinearSpec, Matmul
from qaft.updates.base import LowRankFactors, Update
from qaft.updates.factors import check_rank, random_down


class LowRank(Update):
    """``y = W0 x + s B A x``; R (O + I) trainables.

    Args:
        spec: the layer to adapt.
        rank: R.
        alpha: s = alpha / rank where no norm is folded into the weight.

    Raises:
        ValueError: rank is not in [1, min(O, I)].
    """

    formula = "W0 + s B A"
    source = "LoRA, arXiv 2106.09685"

    def __init__(self, spec: LinearSpec, *, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        check_rank(spec, rank)
        self.input_scale = spec.input_scale
        self.scale = spec.input_scale * alpha / rank
        self.down = nn.Parameter(random_down(spec, rank))
        self.up = nn.Parameter(torch.zeros(spec.out_features, rank, dtype=spec.dtype))

    @torch.no_grad()
    def start_from(self, factors: LowRankFactors) -> None:
        """Start at ``dW = factors.up @ factors.down`` instead of 0; ranks above theirs start as without them.

        Raises:
            ValueError: the factors have a higher rank.
        """
        rank = factors.down.shape[0]
        if rank > len(self.down):
            raise ValueError(f"rank={len(self.down)} cannot hold factors of rank {rank}")
        # The size of a norm that is folded into the weight is in the given down, and in the scale of this update.
        self.down[:rank] = factors.down / self.input_scale
        self.up[:, :rank] = factors.up * (self.input_scale / self.scale)

    def forward(self, x: Tensor, base: Matmul) -> Tensor:
        """Return the updated output, [..., I] -> [..., O]."""
        # Scaling the small factor costs R * O products instead of one per output element.
        return base(x) + F.linear(F.linear(x, self.down.to(x.dtype)), (self.scale * self.up).to(x.dtype))

    def tangent(self, x: Tensor, base: Matmul, directions: Mapping[str, Tensor]) -> Tensor:
        """Return ``s (Z_B A + B Z_A) x``, [..., I] -> [..., O]."""
        pairs = [(self.down, directions["up"])] if "up" in directions else []
        pairs += [(directions["down"], self.up)] if "down" in directions else []
        down = torch.cat([down for down, _ in pairs], dim=0)
        up = torch.cat([self.scale * up for _, up in pairs], dim=1)
        return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

    def merge(self, weight: Tensor) -> Tensor:
        """Return ``W0 + s B A``, [O, I]."""
        return weight + (self.scale * self.up @ self.down).to(weight.dtype)

    def low_rank_factors(self) -> LowRankFactors:
        """Return ``(A, s B)``."""
        return LowRankFactors(down=self.down.detach(), up=(self.scale * self.up).detach())
