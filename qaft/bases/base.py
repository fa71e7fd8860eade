"""The frozen linear map ``W0``: whatever its storage, it multiplies and it can be dequantized.

    law:  matmul(x) == x @ dequantize().T

Shapes: O = out_features, I = in_features; x [..., I] -> y [..., O].
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Matmul = Callable[[Tensor], Tensor]
"""``x [..., I] -> x @ W0.T [..., O]``, without bias."""


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """All that an update may know of the layer it adapts.

    Attributes:
        name: the module path, ``"model.layers.3.self_attn.q_proj"``.
        out_features: O.
        in_features: I.
        dtype: dtype of the trainable parameters.
        num_heads: heads whose rows this layer writes (query heads for q_proj, KV heads for k_proj and v_proj), or None
            when the rows are not grouped by head.
        row_scores: [O] importance of each output row, or None when no calibration was run.
        column_scores: [I] importance of each input column, or None.
        places: the entries that a selection pass has chosen (see ``Update.entry_choice``), or None.
        reads: the norm whose output this layer multiplies, or None where that is what another linear has written.
        input_scale: the change of the weight is ``input_scale`` times what the parameters say. The root mean square of
            the norm weight that was folded into the input side, 1 where none was: folding shrinks a weight (by 1000 in
            some first layers), and Adam's steps, which ignore the gradient's size, would be that much too large.
        seed: seed of everything random in the update (initial values, random selections).
    """

    name: str
    out_features: int
    in_features: int
    dtype: torch.dtype = torch.float32
    num_heads: int | None = None
    row_scores: Tensor | None = None
    column_scores: Tensor | None = None
    places: Tensor | None = None
    reads: str | None = None
    input_scale: float = 1.0
    seed: int = 0

    def generator(self) -> torch.Generator:
        """Return a new generator of this layer's random numbers: the same ones whatever else is adapted."""
        return torch.Generator().manual_seed(self.seed ^ zlib.crc32(self.name.encode()))


class _FrozenMatmul(torch.autograd.Function):
    """``x @ W.T + b`` that keeps nothing for backward: W is dequantized again, and a frozen W needs no x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: FrozenLinear, bias: Tensor | None) -> Tensor:
        ctx.base = base
        # The bias inside the product, as nn.Linear has it: added afterwards it would be a second rounding in 16 bits.
        return F.linear(x, base.dequantize().to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grad_outputs
        return grad @ ctx.base.dequantize().to(grad.dtype), None, None


class FrozenLinear(nn.Module, ABC):
    """A linear layer whose weight is never trained, however it is stored.

    Subclasses register their storage as buffers (they move with ``.to`` and are no parameters) and give ``dequantize``.
    A FrozenLinear is itself a drop-in module for ``nn.Linear``: ``forward`` adds the bias.

    Attributes:
        in_features: I.
        out_features: O.
        dtype: the dtype of ``dequantize()``, which is the dtype the weight is rounded to before any use.
        bias: [O] or None.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype
    bias: Tensor | None

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Return the weight, [O, I] in ``self.dtype``; bit-identical on every call."""

    def matmul(self, x: Tensor) -> Tensor:
        """Return ``x @ W0.T``, [..., I] -> [..., O]; differentiable in x, keeps no activation and no dense weight."""
        return _FrozenMatmul.apply(x, self, None)  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ W0.T + bias``, [..., I] -> [..., O]."""
        return _FrozenMatmul.apply(x, self, self.bias)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        """Return shape and dtype, as ``nn.Linear`` prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.dtype}"
