"""LOZO's update with a finite bank of random subspaces: a LoRA whose ``down`` is never trained.

    W = W0 + c sum_p A_p V_p^T,    V_p in {+1, -1}^(I x r) fixed, drawn from (seed, layer, p)      c = spec.input_scale

A zeroth-order step trains the one block A_p that is its turn. With P blocks that take turns the rank is at most r P for
ever (LOZO with a finite pool of V); with a block for every period of the run it is LOZO as published (arXiv 2410.07698,
``W <- W - alpha c U V^T / r``, V resampled every ``interval`` steps).

Each block is a parameter of its own: the others have no gradient while it is trained, so that every optimizer leaves
them and their moments alone until they return.

Layers that read the same norm share V, and compute ``V x`` once. Their U are independent, so the estimate stays
unbiased: what the probe of one layer adds to the estimate of the other has the expectation of ``U_1 U_2^T``, 0. V is
saved with A: what a run was trained along does not depend on how a later version draws it.

Shapes: O = out_features, I = in_features, r = rank, P = blocks, R = r P.  A_p [O, r], V [R, I].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaft.bases.base import LinearSpec, Matmul
from qaft.philox import key_of, pack_bits, signs, unpack_signs
from qaft.updates.base import LowRankFactors, Update
from qaft.updates.factors import check_rank


class Bank(Update):
    """``y = W0 x + c A V x``; R O trainables, of which ``gradient.kind: lozo`` trains r O at a time.

    Args:
        spec: the layer to adapt.
        rank: r, columns that are trained at a time.
        blocks: P; with the default rank, R = 64.
        share: one V for all trained layers that read the same norm (in families whose norms are known).

    Raises:
        ValueError: rank is not in [1, min(O, I)], or there is no block.
    """

    formula = "W0 + c sum_p A_p V_p^T"
    source = "LOZO, arXiv 2410.07698"

    packed: Tensor

    @classmethod
    def is_tied(cls, **options: object) -> bool:
        """Return ``share``."""
        return bool(options.get("share", True))

    def __init__(self, spec: LinearSpec, *, rank: int = 2, blocks: int = 32, share: bool = True) -> None:
        super().__init__()
        check_rank(spec, rank)
        if blocks < 1:
            raise ValueError(f"{spec.name}: blocks={blocks} must be at least 1; rank x blocks bounds the update's rank")
        self.in_features, self.rank = spec.in_features, rank
        self.scale = spec.input_scale
        self.blocks = nn.ParameterList(
            nn.Parameter(torch.zeros(spec.out_features, rank, dtype=spec.dtype)) for _ in range(blocks)
        )
        key, shape = key_of(spec.seed, "basis"), torch.Size((rank, spec.in_features))
        name = spec.reads if share and spec.reads is not None else spec.name
        # One block after the other: the first ones are the same whatever their number.
        drawn = [signs({name: shape}, key=key, step=p, device=torch.device("cpu")) for p in range(blocks)]
        # One bit for each sign: 9 MB for all linear layers of 7B at R = 64.
        self.register_buffer("packed", pack_bits(torch.cat([block[name] for block in drawn]) > 0))

    def _project(self, x: Tensor) -> Tensor:
        """Return ``V x``, [..., R]."""
        return self.of_input(x, lambda given: F.linear(given, self.basis(given.dtype)), self.packed)

    def basis(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Return ``V`` (or some of its rows), [R, I], of +1 and -1."""
        return unpack_signs(self.packed[rows], dtype)[:, : self.in_features]

    def up(self) -> Tensor:
        """Return ``c A``, [O, R]."""
        return self.scale * torch.cat(list(self.blocks), dim=1)

    def forward(self, x: Tensor, base: Matmul) -> Tensor:
        """Return the updated output, [..., I] -> [..., O]."""
        y, z = base(x), self._project(x)
        # The sum inside the product: a separate one would read and write y again.
        return torch.addmm(y.flatten(0, -2), z.flatten(0, -2), self.up().to(x.dtype).T).view_as(y)

    def tangent(self, x: Tensor, base: Matmul, directions: Mapping[str, Tensor]) -> Tensor:
        """Return ``c sum_p Z_p V_p x`` over the blocks of ``directions``, [..., I] -> [..., O]."""
        places = {int(name.removeprefix("blocks.")): value for name, value in directions.items()}
        # In their own columns: beside A in 16 bits a step of epsilon would be rounded away.
        basis = [self.basis(x.dtype, slice(p * self.rank, (p + 1) * self.rank)) for p in places]
        return F.linear(F.linear(x, torch.cat(basis)), (self.scale * torch.cat(list(places.values()), 1)).to(x.dtype))

    def forward_probed(
        self, x: Tensor, base: Matmul, directions: Sequence[Mapping[str, Tensor]], steps: Tensor
    ) -> Tensor:
        """Return the output of a zeroth-order pass; see ``FusesProbe``.

        ``[Z | s Z_p] [A | U]^T`` with ``Z = V x``: the probe is a few columns of a product that is there anyway.
        """
        columns = [
            int(name.removeprefix("blocks.")) * self.rank + i for name in directions[0] for i in range(self.rank)
        ]
        z = self._project(x)
        stepped = steps.unsqueeze(-1) * z[..., columns].unsqueeze(-2)  # [..., G, r]
        up = self.scale * torch.cat([*self.blocks, *(u for direction in directions for u in direction.values())], dim=1)
        y = base(x)
        z = torch.cat([z, stepped.flatten(-2)], dim=-1)
        return y.flatten(0, -2).addmm_(z.flatten(0, -2), up.to(x.dtype).T).view_as(y)

    def merge(self, weight: Tensor) -> Tensor:
        """Return ``W0 + c A V``, [O, I]."""
        up = self.up()
        return weight + (up @ self.basis(up.dtype)).to(weight.dtype)

    def low_rank_factors(self) -> LowRankFactors:
        """Return ``(V, c A)``."""
        up = self.up().detach()
        return LowRankFactors(down=self.basis(up.dtype), up=up)
