"""The one module that replaces a linear layer: a frozen map, an update, and optionally the grid it is served on.

    adapter mode (no quantizer):  y = update(x, base.matmul)                        W is never built
    QAT mode:                     y = x' Q(merge(W0))^T,  x' = act_quantizer(rotation(x))
                                  W is rebuilt in backward, so that only x is kept

Shapes: O = out_features, I = in_features; x [..., I] -> y [..., O].
Source: RoSTE (arXiv 2502.09003) for the estimator; the fused rotations R1 and R2 are already inside ``base``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaft.bases.base import FrozenLinear
from qaft.quant.base import QTensor, Quantizer
from qaft.rotation.base import Rotation
from qaft.updates.base import Update


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


class AdaptedLinear(nn.Module):
    """A linear layer that is trained through ``update`` and, with a quantizer, through the grid it is exported on.

    Args:
        base: the frozen weight; in QAT mode off-grid latents (rotation.md 4.3).
        update: what is trained.
        quantizer: the weight grid, or None for adapter mode.
        rotation: an online rotation of the input axis, applied to x and to the weight's rows alike; None when rotations
            are fused into the base.
        act_quantizer: fake quantizer of the (rotated) input; None for weight-only quantization.
    """

    def __init__(
        self,
        base: FrozenLinear,
        update: Update,
        *,
        quantizer: Quantizer | None = None,
        rotation: Rotation | None = None,
        act_quantizer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.update = update
        self.quantizer = quantizer
        self.rotation = rotation or nn.Identity()
        self.act_quantizer = act_quantizer or nn.Identity()
        self.in_features = base.in_features
        self.out_features = base.out_features

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype the effective weight is rounded to before any use."""
        return self.base.dtype

    @property
    def bias(self) -> Tensor | None:
        """Return the frozen bias, [O] or None."""
        return self.base.bias

    def latent(self) -> Tensor:
        """Return the updated weight before quantization, fp32 [O, I], differentiable in the update's parameters."""
        return self.rotation(self.update.merge(self.base.dequantize().float()))

    def weight(self) -> Tensor:
        """Return the effective weight in ``self.dtype``, [O, I]: what the forward uses and what is exported."""
        latent = self.latent()
        return (latent if self.quantizer is None else self.quantizer(latent)).to(self.dtype)

    @torch.no_grad()
    def quantized(self) -> QTensor | None:
        """Return the codes and scales that the forward uses, or None in adapter mode."""
        return None if self.quantizer is None else self.quantizer.quantize(self.latent())

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, [..., I] -> [..., O]."""
        if self.quantizer is not None:
            x = self.act_quantizer(self.rotation(x))
            return _RebuiltLinear.apply(x, self.weight, self.base.bias, *self.update.parameters())
        y = self.update(x, self.base.matmul)
        return y if self.base.bias is None else y + self.base.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Return the shape, as ``nn.Linear`` prints it."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
