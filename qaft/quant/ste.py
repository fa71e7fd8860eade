"""The straight-through estimator: the forward value is quantized, the gradient is that of the identity.

    dQ/dw = 1 inside the grid's range, 0 outside (clamp mask); the scale is a constant

Source: RoSTE (arXiv 2502.09003), section 3, with the clamp mask of torchao and EfficientQAT instead of none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """Returns ``quantized`` and sends the gradient to ``weight``."""

    @staticmethod
    def forward(weight: Tensor, quantized: Tensor, inside: Tensor | None) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        weight, _, inside = inputs
        ctx.dtype = weight.dtype
        ctx.save_for_backward(inside)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grad_outputs
        (inside,) = ctx.saved_tensors
        if inside is not None:
            grad = grad * inside
        return grad.to(ctx.dtype), None, None


def straight_through(weight: Tensor, quantized: Tensor, inside: Tensor | None) -> Tensor:
    """Return the values of ``quantized`` with the gradient ``dL/dweight = dL/dquantized * inside``.

    Args:
        weight: the latent weight, any shape; its gradient has its dtype.
        quantized: the weight on its grid, same shape. It gets no gradient.
        inside: bool, same shape (one byte per element): where the weight lies within the range of the grid. None when
            it does everywhere, which keeps nothing for backward.
    """
    return _StraightThrough.apply(weight, quantized, inside)  # pyright: ignore[reportReturnType]
