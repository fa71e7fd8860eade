"""GSOFT: the weight times an orthogonal matrix of two block-diagonal factors with a shuffle between them.

    W = diag(1 + d) W0 Q,    Q = P^T L P R,    L = diag(L_1 .. L_k), R = diag(R_1 .. R_k)     (GSOFT, arXiv 2406.10019)

    block = (I + S)(I - S)^-1 = I + 2 S (I - S)^-1,    S = -S^T        (Cayley, exact)
    (P x)[c k + g] = x[g b + c]                                        (reshape to [k, b], transpose)

Q is dense when b^2 >= I. Q multiplies the input, so a packed W0 stays as it is; a rotation's size does not depend on
that of the weight, and ``spec.input_scale`` has nothing to correct. Only the entries above the diagonal of S are
parameters: as full blocks, half of them would be redundant, and Adam would move S by the same step.

Layers that read the same norm share one Q, and compute ``Q x`` once: for q, k and v a third of the angles and the time.

Exports hold the product, because no program that loads one would apply Q: ``merged`` in 16 bits, or packed where the
weight was trained through a grid.

Shapes: O = out_features, I = in_features, b = block, k = I / b.  S_j as [k, b (b - 1) / 2], d [O].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qaft.bases.base import LinearSpec, Matmul
from qaft.updates.base import Update
from qaft.updates.group_shuffle import cayley, rotated, skew
from qaft.updates.scaling import scaled


class GSOFT(Update):
    """``y = (1 + d) W0 (Q x)``; I (b - 1) + O trainables; ``x``, ``W0 Q x`` and 2 I b scalars are kept for backward.

    Args:
        spec: the layer to adapt.
        block: b.
        scale: learn d; without it the update keeps all angles and lengths of the weight's rows.
        share: one Q for all trained layers that read the same norm (in families whose norms are known); its learning
            rate is that of the first of them.

    Raises:
        ValueError: block does not divide I, or is smaller than 2.
    """

    formula = "diag(1 + d) W0 P^T L P R"
    source = "GSOFT, arXiv 2406.10019"
    shared = ("right", "left")

    @classmethod
    def is_tied(cls, **options: object) -> bool:
        """Return ``share``."""
        return bool(options.get("share", True))

    def __init__(self, spec: LinearSpec, *, block: int = 32, scale: bool = True, share: bool = True) -> None:
        super().__init__()
        size = spec.in_features
        if block < 2 or size % block:
            fitting = [b for b in (4, 8, 16, 32, 64, 128) if size % b == 0] or [
                b for b in range(2, size + 1) if size % b == 0
            ]
            raise ValueError(
                f"{spec.name}: block={block} must be at least 2 and divide the {size} input features; "
                f"try {', '.join(str(b) for b in fitting[:6])}"
            )
        self.block, self.num_blocks = block, size // block
        entries = (self.num_blocks, block * (block - 1) // 2)
        self.right = nn.Parameter(torch.zeros(entries, dtype=spec.dtype))
        self.left = nn.Parameter(torch.zeros(entries, dtype=spec.dtype))
        self.outputs = nn.Parameter(torch.zeros(spec.out_features, dtype=spec.dtype)) if scale else None

    def _change(self, entries: Tensor) -> Tensor:
        """Return each block minus I."""
        return cayley(entries, self.block)[0]

    def _change_tangent(self, entries: Tensor, direction: Tensor) -> Tensor:
        """Return the derivative of each block: ``2 M Z M``."""
        inverse = cayley(entries, self.block)[1]
        return 2 * inverse @ skew(direction, self.block) @ inverse

    def _shuffled(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_blocks, self.block)).mT.flatten(-2)

    def _unshuffled(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.block, self.num_blocks)).mT.flatten(-2)

    def rotate(self, x: Tensor) -> Tensor:
        """Return ``Q x`` along the last axis, [..., I], in the dtype of x, keeping x and 2 I b scalars for backward."""
        return rotated(x, self.right, self.left, block=self.block)

    def forward(self, x: Tensor, base: Matmul) -> Tensor:
        """Return the updated output, [..., I] -> [..., O]."""
        y = base(self.of_input(x, self.rotate, self.right, self.left))
        return y if self.outputs is None else scaled(y, self.outputs)

    def tangent(self, x: Tensor, base: Matmul, directions: Mapping[str, Tensor]) -> Tensor:
        """Return ``(1 + d) W0 (dQ x) + z W0 Q x``, ``dQ = P^T (dL P R + L P dR)``, [..., I] -> [..., O]."""
        left = self._change(self.left)
        turned = self._shuffled(_plus_blocks(x, self._change(self.right)))
        moved = torch.zeros_like(x)
        if "right" in directions:
            first = self._shuffled(_blocks(x, self._change_tangent(self.right, directions["right"])))
            moved = moved + _plus_blocks(first, left)
        if "left" in directions:
            moved = moved + _blocks(turned, self._change_tangent(self.left, directions["left"]))
        y = base(self._unshuffled(moved))
        if self.outputs is not None:
            y = scaled(y, self.outputs)
        if "outputs" in directions:
            q_x = self._unshuffled(_plus_blocks(turned, left))
            y = y + base(q_x) * directions["outputs"].to(x.dtype)
        return y

    def merge(self, weight: Tensor) -> Tensor:
        """Return ``diag(1 + d) W0 Q``, [O, I]."""
        # A row w becomes Q^T w^T = R^T P^T L^T P w^T.
        rows = _plus_blocks(self._shuffled(weight), self._change(self.left).mT)
        merged = _plus_blocks(self._unshuffled(rows), self._change(self.right).mT)
        return merged if self.outputs is None else scaled(merged.T, self.outputs).T


def _blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return ``diag(blocks) x`` along the last axis, [..., I], in the dtype of x."""
    parts = x.unflatten(-1, blocks.shape[:2])
    return torch.einsum("...gb,gcb->...gc", parts, blocks.to(x.dtype)).flatten(-2)


def _plus_blocks(x: Tensor, changes: Tensor) -> Tensor:
    # Near the identity the small entries of a 16-bit product keep their digits only when they are apart from the 1.
    return x + _blocks(x, changes)
