"""A product with a sparse matrix of trained blocks, as a few dense products of the same size.

    y[:, row_p] += x[:, column_p] v_p^T,    dx[:, column_p] += g[:, row_p] v_p,    dv_p = g[:, row_p]^T x[:, column_p]

A block is a piece of a row. Blocks of one column read the same w inputs: they are multiplied together, in groups of one
size, so that all groups are one batched product. Only x is kept for backward, and nothing of the size of the matrix is
made.

Shapes: O = out_features, I = in_features, T = tokens, n places of w consecutive entries, C = I / w columns: place p is
row p // C and column p % C. G groups of m slots. places [n], v [n, w].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FILL = 2
"""A group is at most so many times as large as a column has blocks on average: crowded columns get several groups."""


@dataclass(frozen=True)
class BlockGroups:
    """Where each block is among the groups.

    Attributes:
        slots: of each place, [n].
        rows: that each slot's products belong to, [G m]; 0 for slots without a place.
        columns: that each group reads, [G]; None where group c reads column c.
        num_columns: C.
    """

    slots: Tensor
    rows: Tensor
    columns: Tensor | None
    num_columns: int

    @classmethod
    def of(cls, places: Tensor, num_columns: int) -> BlockGroups:
        """Sort places into groups, on their device."""
        places = places.long()
        column = places % num_columns
        counts = torch.bincount(column, minlength=num_columns)
        most = int(counts.max())
        size = min(most, math.ceil(_FILL * len(places) / num_columns))
        groups = (counts + size - 1) // size if most > size else torch.ones_like(counts)
        order = column.argsort(stable=True)
        ordered = column[order]
        rank = torch.arange(len(places), device=places.device) - (counts.cumsum(0) - counts)[ordered]
        slots = torch.empty_like(places)
        slots[order] = (groups.cumsum(0) - groups)[ordered] * size + rank
        rows = places.new_zeros(int(groups.sum()) * size)
        rows[slots] = places // num_columns
        columns = torch.arange(num_columns, device=places.device).repeat_interleave(groups) if most > size else None
        return cls(slots, rows, columns, num_columns)

    def inputs(self, tokens: Tensor) -> Tensor:
        """Return what each group reads, [T, I] -> [G, T, w]."""
        parts = tokens.unflatten(1, (self.num_columns, -1)).transpose(0, 1)
        return parts if self.columns is None else parts[self.columns]

    def to_inputs(self, parts: Tensor) -> Tensor:
        """Return the transpose of ``inputs``, [G, T, w] -> [T, I]: what several groups read is added."""
        if self.columns is not None:
            parts = parts.new_zeros(self.num_columns, *parts.shape[1:]).index_add_(0, self.columns, parts)
        return parts.transpose(0, 1).flatten(1)

    def grouped(self, blocks: Tensor) -> Tensor:
        """Return the blocks in their slots, zero in the others, [n, w] -> [G, m, w]."""
        slots = blocks.new_zeros(len(self.rows), blocks.shape[1])
        slots[self.slots] = blocks
        return slots.unflatten(0, (self.num_columns if self.columns is None else len(self.columns), -1))


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, groups: BlockGroups, scale: float, out_features: int) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.groups, ctx.scale = groups, scale
        tokens = x.flatten(0, -2)
        blocks = groups.grouped((scale * values).to(x.dtype))
        products = groups.inputs(tokens) @ blocks.mT  # [G, T, m]
        y = x.new_zeros(len(tokens), out_features)
        y.index_add_(1, groups.rows, products.transpose(0, 1).flatten(1))
        return y.view(*x.shape[:-1], out_features)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        groups, scale = ctx.groups, ctx.scale
        grad = grad_outputs[0].flatten(0, -2)
        blocks = groups.grouped((scale * values).to(grad.dtype))
        gathered = grad.T[groups.rows].unflatten(0, blocks.shape[:2])  # [G, m, T]
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = groups.to_inputs(gathered.mT @ blocks).view(x.shape)
        if ctx.needs_input_grad[1]:
            products = gathered @ groups.inputs(x.flatten(0, -2))  # [G, m, w]
            grad_values = (scale * products.flatten(0, 1)[groups.slots]).to(values.dtype)
        return grad_x, grad_values, None, None, None


def block_linear(x: Tensor, values: Tensor, groups: BlockGroups, *, scale: float, out_features: int) -> Tensor:
    """Return ``x (scale S)^T``, [..., I] -> [..., O], differentiable in x and in ``values``.

    Args:
        x: [..., I].
        values: of the blocks of S, [n, w].
        groups: of their places, ``BlockGroups.of(places, I / w)``.
        scale: factor on S.
        out_features: O.
    """
    return _BlockLinear.apply(x, values, groups, scale, out_features)  # pyright: ignore[reportReturnType]
