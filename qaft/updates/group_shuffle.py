"""``Q x`` for ``Q = P^T L P R`` with Cayley blocks: x is kept for backward, and the blocks are made again there.

    block = I + C,    C = 2 S M,    M = (I - S)^-1,    dC = 2 M dS M

Features come first ([I, T]) inside: a block is a plain product with all tokens, and a shuffle moves whole rows.

Shapes: I = in_features, T = tokens, b = block, k = I / b.  S, C, M [k, b, b], entries [k, b (b - 1) / 2].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def skew(entries: Tensor, block: int) -> Tensor:
    """Return S of each block from its entries above the diagonal, [k, b, b], in at least fp32."""
    wide = torch.promote_types(entries.dtype, torch.float32)
    flat = torch.zeros(len(entries), block * block, dtype=wide, device=entries.device)
    matrix = flat.index_copy(1, _above(block, entries.device), entries.to(wide)).unflatten(1, (block, block))
    return matrix - matrix.mT


def _above(block: int, device: torch.device) -> Tensor:
    """Return the places of the entries above the diagonal in a flat block."""
    row, column = torch.triu_indices(block, block, offset=1, device=device)
    return row * block + column


def cayley(entries: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return C, in which nothing cancels, and M of each block, [k, b, b]."""
    matrix = skew(entries, block)
    inverse = torch.linalg.inv(torch.eye(block, dtype=matrix.dtype, device=matrix.device) - matrix)
    return 2 * matrix @ inverse, inverse


def _gradient_of_entries(gradient: Tensor, inverse: Tensor, entries: Tensor) -> Tensor:
    """Return the gradient of the entries from that of C."""
    of_skew = 2 * inverse.mT @ gradient.to(inverse.dtype) @ inverse.mT
    places = _above(inverse.shape[-1], inverse.device)
    return (of_skew - of_skew.mT).flatten(1).index_select(1, places).to(entries.dtype)


def _plus(x: Tensor, changes: Tensor) -> Tensor:
    """Return ``x + C x``, [k, b, T]: the sum inside the product rounds once."""
    return torch.baddbmm(x, changes.to(x.dtype), x)


def _shuffled(x: Tensor) -> Tensor:
    """Return ``P x`` in groups of its own, [k, b, T]."""
    return x.transpose(0, 1).reshape(x.shape)


def _unshuffled(x: Tensor) -> Tensor:
    """Return ``P^T x`` in groups of its own, [k, b, T]."""
    k, b, tokens = x.shape
    return x.reshape(b, k, tokens).transpose(0, 1).contiguous()


def _grouped(x: Tensor, block: int) -> Tensor:
    return x.flatten(0, -2).T.contiguous().view(-1, block, x.shape[:-1].numel())


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, right: Tensor, left: Tensor, block: int) -> Tensor:
        ctx.save_for_backward(x, right, left)
        ctx.block = block
        turned = _shuffled(_plus(_grouped(x, block), cayley(right, block)[0]))
        return _unshuffled(_plus(turned, cayley(left, block)[0])).flatten(0, 1).T.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, right, left = ctx.saved_tensors
        (c_right, m_right), (c_left, m_left) = cayley(right, ctx.block), cayley(left, ctx.block)
        features = _grouped(x, ctx.block)
        outer = _shuffled(_grouped(grad_outputs[0], ctx.block))
        inner = _unshuffled(_plus(outer, c_left.mT))
        grad_x = grad_right = grad_left = None
        if ctx.needs_input_grad[0]:
            grad_x = _plus(inner, c_right.mT).flatten(0, 1).T.reshape(x.shape)
        if ctx.needs_input_grad[1]:
            grad_right = _gradient_of_entries(inner @ features.mT, m_right, right)
        if ctx.needs_input_grad[2]:
            turned = _shuffled(_plus(features, c_right))
            grad_left = _gradient_of_entries(outer @ turned.mT, m_left, left)
        return grad_x, grad_right, grad_left, None


def rotated(x: Tensor, right: Tensor, left: Tensor, *, block: int) -> Tensor:
    """Return ``Q x`` along the last axis, [..., I], in the dtype of x; differentiable in all three.

    Args:
        x: [..., I].
        right: entries of R's blocks.
        left: entries of L's blocks.
        block: b.
    """
    return _Rotated.apply(x, right, left, block)  # pyright: ignore[reportReturnType]
