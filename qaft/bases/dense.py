"""A frozen weight in 16 or 32 bits: latents of quantization-aware layers, and layers that stay unquantized."""

from __future__ import annotations

import torch
from torch import Tensor

from qaft.bases.base import FrozenLinear


class DenseBase(FrozenLinear):
    """``W0`` stored as it is.

    Args:
        weight: [O, I], floating point; kept in its own dtype.
        bias: [O] or None.
        dtype: the dtype in which the layer computes; the weight's own when None. A latent may be stored wider (fp32
            dithered latents under a bf16 model).
    """

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype or weight.dtype
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def dequantize(self) -> Tensor:
        """Return the stored weight, [O, I], in its storage dtype (no copy)."""
        return self.weight
