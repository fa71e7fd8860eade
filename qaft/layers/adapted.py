"""The one module that replaces a linear layer: a frozen map, an update, and optionally the grid it is served on.

    adapter mode (no quantizer):  y = update(x, base.matmul)                        W is never built
    QAT mode:                     y = x' Q(merge(W0))^T,  x' = act_quantizer(rotation(x))
                                  W is rebuilt in backward, so that only x is kept

Shapes: O = out_features, I = in_features; x [..., I] -> y [..., O].
Source: RoSTE (arXiv 2502.09003) for the estimator; the fused rotations R1 and R2 are already inside ``base``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from qaft.bases.base import FrozenLinear
from qaft.bases.rebuilt import rebuilt_linear
from qaft.quant.base import QTensor, Quantizer
from qaft.rotation.base import Rotation
from qaft.updates.base import Update


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
        # Set by regularizers for the length of a pass; see qaft/layers/passes.py.
        self.shows: Literal["trained", "base", "unquantized_base"] = "trained"
        self.noise: Callable[[Tensor], Tensor] | None = None
        # Set for the length of a zeroth-order pass, where the update adds the probe itself; see qaft/layers/probe.py.
        self.probe: Callable[[Tensor], Tensor] | None = None

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
        return self._on_grid(self.latent())

    def _on_grid(self, latent: Tensor) -> Tensor:
        return (latent if self.quantizer is None else self.quantizer(latent)).to(self.dtype)

    @torch.no_grad()
    def quantized(self) -> QTensor | None:
        """Return the codes and scales that the forward uses, or None in adapter mode."""
        return None if self.quantizer is None else self.quantizer.quantize(self.latent())

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, [..., I] -> [..., O]."""
        y = self._trained_output(x) if self.shows == "trained" else self._base_output(x)
        if self.noise is not None and self.training:
            base = self._base_output(x)
            y = base + (y - base) * self.noise(y)
        return y

    def _trained_output(self, x: Tensor) -> Tensor:
        if self.quantizer is not None:
            x = self.act_quantizer(self.rotation(x))
            return rebuilt_linear(x, self.weight, self.base.bias, *self.update.parameters())
        return self._plus_bias(self.update(x, self.base.matmul) if self.probe is None else self.probe(x))

    def _base_output(self, x: Tensor) -> Tensor:
        """Return what the layer computes without its update, on the same grid unless it shows the unquantized base."""
        if self.quantizer is not None and self.shows != "unquantized_base":
            x = self.act_quantizer(self.rotation(x))
            return rebuilt_linear(x, self._base_weight, self.base.bias)
        return self._plus_bias(self.base.matmul(x))

    def _base_weight(self) -> Tensor:
        return self._on_grid(self.rotation(self.base.dequantize().float()))

    def _plus_bias(self, y: Tensor) -> Tensor:
        return y if self.base.bias is None else y + self.base.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Return the shape, as ``nn.Linear`` prints it."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
