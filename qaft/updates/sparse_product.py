"""A product with a sparse matrix whose values are trained, at the cost of its entries.

    y = x S^T,    dx = g S,    dv_e = sum over tokens of g[:, row_e] x[:, column_e]

Rows of x^T (and of g^T) are gathered, weighted and summed by ``embedding_bag``, which is a sparse product in every
dtype and on every device; only x is kept, and nothing of the size of the matrix exists.

Shapes: O = out_features, I = in_features, T = tokens, n entries: place p is row p // I and column p % I.  places [n]
int32, ascending; v [n, 1].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qaft.updates.features_first import features_first, tokens_first


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, places: Tensor, order: Tensor, scale: float, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, values, places)
        # Not an activation: it lives on with the layer, and nothing has to move it about.
        ctx.order, ctx.scale, ctx.shape = order, scale, shape
        rows, columns = places // shape[1], places % shape[1]
        weights = (scale * values).flatten().to(x.dtype)
        return tokens_first(_bags(features_first(x), columns, rows, weights, shape[0]), x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, values, places = ctx.saved_tensors
        order = ctx.order
        rows, columns = places // ctx.shape[1], places % ctx.shape[1]
        features = features_first(grad)  # [O, T]
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            weights = (ctx.scale * values).flatten()[order].to(grad.dtype)
            grad_x = tokens_first(_bags(features, rows[order], columns[order], weights, ctx.shape[1]), x.shape[:-1])
        if ctx.needs_input_grad[1]:
            dots = _dots(features, features_first(x), rows, columns)
            grad_values = (ctx.scale * dots).to(values.dtype).view(values.shape)
        return grad_x, grad_values, None, None, None, None


def _bags(table: Tensor, gathered: Tensor, bags: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return ``out[b] = sum over entries of bag b of weights * table[gathered]``, [count, T]; ``bags`` ascend."""
    starts = torch.searchsorted(bags, torch.arange(count, device=bags.device, dtype=bags.dtype), out_int32=True)
    return F.embedding_bag(gathered, table, starts, mode="sum", per_sample_weights=weights)


def _dots(grad: Tensor, features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return ``grad[rows] . features[columns]`` of every entry, [n], in at least fp32."""
    # In 16 bits this product is twice as slow on CPUs, and less exact.
    wide = torch.promote_types(grad.dtype, torch.float32)
    # The derivative of ``_bags`` in its weights; by way of autograd the bags themselves would be summed once more.
    starts = rows.new_zeros(0)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad.to(wide), features.to(wide), columns, starts, rows, 0
    )


def sparse_linear(
    x: Tensor, values: Tensor, places: Tensor, order: Tensor, *, scale: float, shape: tuple[int, int]
) -> Tensor:
    """Return ``x (scale S)^T``, [..., I] -> [..., O], differentiable in x and in ``values``.

    Args:
        x: [..., I].
        values: of the entries of S, [n, 1].
        places: where S has them.
        order: ``by_column(places, I)``.
        scale: factor on S.
        shape: O and I.
    """
    return _SparseLinear.apply(x, values, places, order, scale, shape)  # pyright: ignore[reportReturnType]
