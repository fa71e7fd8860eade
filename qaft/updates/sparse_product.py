"""A product with a sparse matrix whose values are trained, at the cost of its entries.

    y = x S^T,    dx = g S,    dv_e = sum over tokens of g[:, row_e] x[:, column_e]

A kernel of its own on CPUs in fp32 and bf16; elsewhere rows of x^T (and of g^T) are gathered, weighted and summed by
``embedding_bag``, which is a sparse product in every dtype and on every device. Only x is kept, and nothing of the size
of the matrix exists.

Shapes: O = out_features, I = in_features, T = tokens, n entries: place p is row p // I and column p % I.  places [n]
int32, ascending; v [n, 1].
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qaft.native.build import address, library
from qaft.updates.features_first import features_first, tokens_first


@dataclass(frozen=True)
class EntryOrder:
    """Where the entries of each row begin, and the order of the entries by column.

    Attributes:
        row_starts: number of entries in the rows before each row, and of all, int32 [O + 1].
        by_column: the entries in the order of their columns, those of a column in the order of their rows, int32 [n].
        column_starts: number of entries in the columns before each column, and of all, int32 [I + 1].
    """

    row_starts: Tensor
    by_column: Tensor
    column_starts: Tensor

    @classmethod
    def of(cls, places: Tensor, shape: tuple[int, int]) -> EntryOrder:
        """Order the places of a matrix of this shape (O and I), on their device.

        Raises:
            ValueError: places do not ascend, or are not in the matrix.
        """
        size, width = math.prod(shape), shape[1]
        if len(places) and not (0 <= int(places[0]) and int(places[-1]) < size and (places.diff() > 0).all()):
            raise ValueError(f"places of the entries must ascend within 0 .. {size - 1}: the checkpoint is damaged")
        columns = places % width
        order = columns.argsort(stable=True)
        return cls(_starts(places // width, shape[0]), order.int(), _starts(columns[order], width))


def _starts(ascending: Tensor, count: int) -> Tensor:
    bounds = torch.arange(count + 1, device=ascending.device, dtype=ascending.dtype)
    return torch.searchsorted(ascending, bounds, out_int32=True)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, places: Tensor, order: EntryOrder, scale: float) -> Tensor:
        ctx.save_for_backward(x, values, places)
        # Not activations: they live on with the layer, and nothing has to move them about.
        ctx.order, ctx.scale = order, scale
        return _product(x, places % x.shape[-1], order.row_starts, (scale * values).flatten())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, values, places = ctx.saved_tensors
        width, order = x.shape[-1], ctx.order
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            weights = (ctx.scale * values).flatten()[order.by_column]
            grad_x = _product(grad, places[order.by_column] // width, order.column_starts, weights)
        if ctx.needs_input_grad[1]:
            dots = _dots(grad, x, places // width, places % width)
            grad_values = (ctx.scale * dots).to(values.dtype).view(values.shape)
        return grad_x, grad_values, None, None, None


def _product(x: Tensor, gathered: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Return y with ``y[..., b]`` the sum of weights * x[..., gathered] from starts[b] to starts[b + 1]."""
    if (kernel := _kernel("product", x)) is None:
        features = F.embedding_bag(
            gathered,
            features_first(x),
            starts,
            mode="sum",
            per_sample_weights=weights.to(x.dtype),
            include_last_offset=True,
        )
        return tokens_first(features, x.shape[:-1])
    x, weights = x.contiguous(), weights.float()
    y = x.new_empty(*x.shape[:-1], len(starts) - 1)
    sizes = (ctypes.c_long(size) for size in (x.numel() // x.shape[-1], x.shape[-1], y.shape[-1]))
    kernel(*map(address, (x, y, starts, gathered, weights)), *sizes, torch.get_num_threads())
    return y


def _dots(grad: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the sum over tokens of ``grad[..., row] x[..., column]`` of every entry, [n], in at least fp32."""
    if (kernel := _kernel("dots", x)) is None:
        # In 16 bits this product is twice as slow on CPUs, and less exact.
        wide = torch.promote_types(grad.dtype, torch.float32)
        # The derivative of ``embedding_bag`` in its weights; by autograd the bags themselves would be summed once more.
        starts = rows.new_zeros(0)
        features = (features_first(tensor).to(wide) for tensor in (grad, x))
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(*features, columns, starts, rows, 0)
    grad, x = grad.contiguous(), x.contiguous()
    sums = torch.zeros(len(rows), dtype=torch.float32)
    sizes = (ctypes.c_long(n) for n in (len(rows), x.numel() // x.shape[-1], x.shape[-1], grad.shape[-1]))
    kernel(*map(address, (grad, x, rows, columns, sums)), *sizes, torch.get_num_threads())
    return sums


_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def _kernel(name: str, x: Tensor) -> Any:
    """Return the kernel for tensors like ``x``, or None."""
    if x.device.type != "cpu" or x.dtype not in _DTYPES or (kernels := library("sparse")) is None:
        return None
    return getattr(kernels, f"sparse_{name}_{_DTYPES[x.dtype]}")


def sparse_linear(x: Tensor, values: Tensor, places: Tensor, order: EntryOrder, *, scale: float) -> Tensor:
    """Return ``x (scale S)^T``, [..., I] -> [..., O], differentiable in x and in ``values``.

    Args:
        x: [..., I].
        values: of the entries of S, [n, 1].
        places: where S has them.
        order: of these places.
        scale: factor on S.
    """
    return _SparseLinear.apply(x, values, places, order, scale)  # pyright: ignore[reportReturnType]
