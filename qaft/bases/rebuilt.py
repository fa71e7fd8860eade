"""A product with a weight that is a function of trainables: backward keeps x and rebuilds the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _RebuiltLinear(torch.autograd.Function):
    """``F.linear(x, build(), bias)`` that keeps x and rebuilds the weight in backward.

    ``torch.utils.checkpoint`` would give the same gradients but repeats the forward matmul; here only the weight is
    rebuilt. The parameters are inputs of the function, so that engines that hook gradients see an ordinary graph.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, build: Callable[[], Tensor], bias: Tensor | None, *theta: Tensor) -> Tensor:
        ctx.build = build
        ctx.save_for_backward(x, *theta)
        return F.linear(x, build().to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, *theta = ctx.saved_tensors
        with torch.enable_grad():
            weight = ctx.build()
        grad_x = grad @ weight.detach().to(grad.dtype) if ctx.needs_input_grad[0] else None
        trained = [p for p, needed in zip(theta, ctx.needs_input_grad[3:], strict=True) if needed]
        grads: list[Tensor | None] = [None] * len(theta)
        if trained:
            grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)  # [O, I]
            found = iter(torch.autograd.grad(weight, trained, grad_weight.to(weight.dtype)))
            grads = [next(found) if needed else None for needed in ctx.needs_input_grad[3:]]
        return (grad_x, None, None, *grads)


def rebuilt_linear(x: Tensor, build: Callable[[], Tensor], bias: Tensor | None, *theta: Tensor) -> Tensor:
    """Return ``x @ build().T + bias``, [..., I] -> [..., O], differentiable in x and in ``theta``.

    Args:
        x: [..., I].
        build: the weight [O, I] as a function of ``theta``, the same whenever it is called.
        bias: [O] or None; frozen.
        *theta: the parameters that ``build`` reads.
    """
    return _RebuiltLinear.apply(x, build, bias, *theta)  # pyright: ignore[reportReturnType]
