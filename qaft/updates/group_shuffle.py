"""``Q x`` for ``Q = P^T L P R`` with Cayley blocks: x and the inverses M are kept for backward.

    block = I + C,    C = 2 S M,    M = (I - S)^-1,    dC = 2 M dS M

Features come first ([I, T]) inside: a block is a plain product with all tokens, and a shuffle moves whole rows.

Shapes: I = in_features, T = tokens, b = block, k = I / b.  S, C, M [k, b, b], entries [k, b (b - 1) / 2].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qaft.updates.features_first import features_first, tokens_first


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


def _changes(entries: Tensor, inverse: Tensor) -> Tensor:
    """Return C of ``cayley`` from M."""
    return 2 * skew(entries, inverse.shape[-1]) @ inverse


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
    return features_first(x).view(-1, block, x.shape[:-1].numel())


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, right: Tensor, left: Tensor, block: int) -> Tensor:
        (c_right, m_right), (c_left, m_left) = cayley(right, block), cayley(left, block)
        ctx.save_for_backward(x, right, left, m_right, m_left)
        ctx.block = block
        turned = _shuffled(_plus(_grouped(x, block), c_right))
        return tokens_first(_unshuffled(_plus(turned, c_left)).flatten(0, 1), x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, right, left, m_right, m_left = ctx.saved_tensors
        c_right, c_left = _changes(right, m_right), _changes(left, m_left)
        features = _grouped(x, ctx.block)
        outer = _shuffled(_grouped(grad_outputs[0], ctx.block))
        inner = _unshuffled(_plus(outer, c_left.mT))
        grad_x = grad_right = grad_left = None
        if ctx.needs_input_grad[0]:
            grad_x = tokens_first(_plus(inner, c_right.mT).flatten(0, 1), x.shape[:-1])
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
