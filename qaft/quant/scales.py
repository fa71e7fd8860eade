"""How the scales of integer grids are stored: rounded before any code is computed with them.

fp32 scales keep 16 significant bits: ``s q`` is then exact in fp32 for every code, as it is for 16-bit scales, and
requantizing finds the same scale bit for bit. With 24 bits it does not: ``fl(fl(7 s) / 7) != s`` for some s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DROPPED_BITS = {torch.float32: 8, torch.bfloat16: 16, torch.float16: 13}
"""Low bits that are zero in the fp32 number of a stored scale. fp32 scales drop 8 by choice: the product with a code of
8 bits then fits 24 bits."""


@dataclass(frozen=True)
class ScaleStorage:
    """The numbers that a scale can be.

    Attributes:
        dtype: torch.float32 (16 significant bits), bfloat16 or float16.

    Raises:
        ValueError: scales have no such dtype.
    """

    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in _DROPPED_BITS:
            raise ValueError(f"scale_dtype={self.dtype} must be one of {', '.join(map(str, _DROPPED_BITS))}")

    def round(self, scale: Tensor) -> Tensor:
        """Return ``scale`` (fp32, >= 0) rounded to what is stored, fp32, at least the smallest normal number."""
        scale = scale.clamp(min=self.smallest)
        if self.dtype != torch.float32:
            return scale.to(self.dtype).float()
        # Truncated, not rounded to nearest: adding half a unit to the bits of a NaN could wrap them into a number.
        return (scale.view(torch.int32) & -(1 << _DROPPED_BITS[self.dtype])).view(torch.float32)

    def next_smaller(self, scale: Tensor) -> Tensor:
        """Return the next smaller stored number for each ``scale``, a stored one above ``smallest``, fp32."""
        return (scale.view(torch.int32) - (1 << _DROPPED_BITS[self.dtype])).view(torch.float32)

    @property
    def smallest(self) -> float:
        """The smallest normal number of the dtype."""
        return torch.finfo(self.dtype).tiny


def quotient(x: Tensor, divisor: int) -> Tensor:
    """Return ``x / divisor``, rounded once on every device.

    torch multiplies a CUDA tensor by the reciprocal of a number, with two roundings: ``(7 s) / 7`` may then be less
    than s, and a quantized weight would find another scale than its own.
    """
    return x / torch.full_like(x, divisor)
