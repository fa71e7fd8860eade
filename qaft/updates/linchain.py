"""LinChain: a low-rank update whose two factors are joined by a chain of square maps.

    W = W0 + s B M_n .. M_1 A,   M_j = I + D_j,   s = c alpha / rank        (LinChain, arXiv 2411.00039; n = 0 is LoRA)

c = spec.input_scale. The chain changes how A and B move, not which dW can be reached: the rank stays R, and the product
B M_n .. M_1 is the B of a plain LoRA.

Shapes: O = out_features, I = in_features, R = rank, n = depth.  A [R, I], D_j [R, R], B [O, R].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaft.bases.base import LinearSpec, Matmul
from qaft.updates.base import LowRankFactors, Update
from qaft.updates.factors import check_rank, random_down


class LinChain(Update):
    """``y = W0 x + s B M_n .. M_1 A x``; R (O + I) + n R^2 trainables.

    Args:
        spec: the layer to adapt.
        rank: R.
        depth: n, the number of square maps; 0 gives LoRA.
        alpha: s = alpha / rank where no norm is folded into the weight.

    Raises:
        ValueError: rank is not in [1, min(O, I)], or depth is negative.
    """

    formula = "W0 + s B M_n .. M_1 A"
    source = "LinChain, arXiv 2411.00039"

    def __init__(self, spec: LinearSpec, *, rank: int = 8, depth: int = 2, alpha: float = 16.0) -> None:
        super().__init__()
        check_rank(spec, rank)
        if depth < 0:
            raise ValueError(f"{spec.name}: depth={depth} must be at least 0, which is plain LoRA; try depth: 2")
        self.scale = spec.input_scale * alpha / rank
        self.down = nn.Parameter(random_down(spec, rank))
        # D = 0 makes the first gradient of B equal to LoRA's, and lets weight decay pull a map to I instead of 0, where
        # every gradient would stop.
        self.chain = nn.ParameterList(nn.Parameter(torch.zeros(rank, rank, dtype=spec.dtype)) for _ in range(depth))
        self.up = nn.Parameter(torch.zeros(spec.out_features, rank, dtype=spec.dtype))

    def forward(self, x: Tensor, base: Matmul) -> Tensor:
        """Return the updated output, [..., I] -> [..., O]."""
        h = F.linear(x, self.down.to(x.dtype))
        for link in self.chain:
            h = h + F.linear(h, link.to(x.dtype))
        return base(x) + F.linear(h, (self.scale * self.up).to(x.dtype))

    def tangent(self, x: Tensor, base: Matmul, directions: Mapping[str, Tensor]) -> Tensor:
        """Return ``s (Z_B h_n + B dh_n)`` with ``h_j = M_j h_{j-1}``, ``dh_j = M_j dh_{j-1} + Z_j h_{j-1}``."""
        moved = {name: z.to(x.dtype) for name, z in directions.items()}
        h = F.linear(x, self.down.to(x.dtype))
        dh = F.linear(x, moved["down"]) if "down" in moved else torch.zeros_like(h)
        for j, link in enumerate(self.chain):
            dh = dh + F.linear(dh, link.to(x.dtype))
            if f"chain.{j}" in moved:
                dh = dh + F.linear(h, moved[f"chain.{j}"])
            h = h + F.linear(h, link.to(x.dtype))
        dy = F.linear(dh, (self.scale * self.up).to(x.dtype))
        return dy + F.linear(h, self.scale * moved["up"]) if "up" in moved else dy

    def merge(self, weight: Tensor) -> Tensor:
        """Return ``W0 + s B M_n .. M_1 A``, [O, I]."""
        delta: Tensor = self.down
        for link in self.chain:
            delta = delta + link @ delta
        return weight + (self.scale * self.up @ delta).to(weight.dtype)

    def low_rank_factors(self) -> LowRankFactors:
        """Return ``(A, s B M_n .. M_1)``: a LoRA of the same rank."""
        up = (self.scale * self.up).detach()
        for link in reversed(self.chain):
            up = up + up @ link.detach()
        return LowRankFactors(down=self.down.detach(), up=up)
