"""A product with a sparse matrix of trained blocks, as one small dense product for every column of blocks.

    y[:, row_p] += x[:, column_p] v_p^T,    dx[:, column_p] += g[:, row_p] v_p,    dv_p = g[:, row_p]^T x[:, column_p]

A block is a piece of a row. Blocks of one column of blocks read the same w inputs, so that their products are one of
[T, w] and [w, blocks]; only x is kept, and nothing of the size of the matrix exists.

Shapes: O = out_features, I = in_features, T = tokens, n places of w consecutive entries: place p is row p // (I / w),
column of blocks p % (I / w).  places [n], v [n, w].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def column_counts(places: Tensor, columns: int) -> tuple[int, ...]:
    """Return how many of the places each of the ``columns`` columns of blocks has."""
    return tuple(torch.bincount(places.long() % columns, minlength=columns).tolist())


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        places: Tensor,
        order: Tensor,
        counts: tuple[int, ...],
        scale: float,
        out_features: int,
    ) -> Tensor:
        ctx.save_for_backward(x, values, places, order)
        ctx.counts, ctx.scale = counts, scale
        tokens = x.flatten(0, -2)
        rows, blocks = _by_column(values, places, order, counts, scale, x.dtype)
        products = x.new_empty(len(tokens), len(rows))  # [T, n]
        for inputs, of_column in _columns(counts, values.shape[1]):
            torch.mm(tokens[:, inputs], blocks[of_column].T, out=products[:, of_column])
        y = x.new_zeros(len(tokens), out_features).index_add_(1, rows, products)
        return y.view(*x.shape[:-1], out_features)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, values, places, order = ctx.saved_tensors
        tokens, grad = x.flatten(0, -2), grad_outputs[0].flatten(0, -2)
        rows, blocks = _by_column(values, places, order, ctx.counts, ctx.scale, grad.dtype)
        gathered = grad.T[rows].T  # [T, n]
        columns = list(_columns(ctx.counts, values.shape[1]))
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.zeros_like(tokens, dtype=grad.dtype)
            for inputs, of_column in columns:
                torch.mm(gathered[:, of_column], blocks[of_column], out=grad_x[:, inputs])
            grad_x = grad_x.view(x.shape)
        if ctx.needs_input_grad[1]:
            products = torch.empty_like(blocks)
            for inputs, of_column in columns:
                torch.mm(gathered[:, of_column].T, tokens[:, inputs], out=products[of_column])
            grad_values = torch.empty_like(values)
            grad_values[order] = (ctx.scale * products).to(values.dtype)
        return grad_x, grad_values, None, None, None, None, None


def _by_column(
    values: Tensor, places: Tensor, order: Tensor, counts: tuple[int, ...], scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the rows [n] and the scaled values [n, w] of the blocks, column after column."""
    return places[order] // len(counts), (scale * values[order]).to(dtype)


def _columns(counts: tuple[int, ...], width: int) -> Iterator[tuple[slice, slice]]:
    """Yield the inputs that a column of blocks reads, and which of the ordered blocks are in it."""
    begin = 0
    for column, count in enumerate(counts):
        if count:
            yield slice(column * width, (column + 1) * width), slice(begin, begin + count)
        begin += count


def block_linear(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    order: Tensor,
    *,
    counts: tuple[int, ...],
    scale: float,
    out_features: int,
) -> Tensor:
    """Return ``x (scale S)^T``, [..., I] -> [..., O], differentiable in x and in ``values``.

    Args:
        x: [..., I].
        values: of the blocks of S, [n, w].
        places: where S has them.
        order: ``by_column(places, I / w)``.
        counts: ``column_counts(places, I / w)``.
        scale: factor on S.
        out_features: O.
    """
    return _BlockLinear.apply(x, values, places, order, counts, scale, out_features)  # pyright: ignore[reportReturnType]
