"""The fake quantization of inputs that compressed-tensors computes when transformers runs its checkpoints.

    s = max |x| / (2^(b-1) - 1/2),    q = round(clamp(x / s, -2^(b-1), 2^(b-1) - 1)),    x^ = s q

All 2^b codes are used, where the kernels of servers divide by 2^(b-1) - 1 and leave the lowest out: another function,
under which a tenth of the codes of a Gaussian token are others. Every step is rounded to the dtype of x, as there.

Source: compressed-tensors 0.20, ``quantization/utils/helpers.py`` (``calculate_qparams``) and
``quantization/lifecycle/forward_helpers.py`` (``_quantize_dequantize``).
Shapes: x [..., D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from qaft.quant.activation import TokenQuantizer


class CompressedTensorsTokens(TokenQuantizer):
    """Rounds each vector along the last axis as compressed-tensors does, with the straight-through gradient. No state.

    Args:
        bits: b, 2 to 8.

    Raises:
        ValueError: bits is out of range.
    """

    def __init__(self, *, bits: int = 8) -> None:
        super().__init__(bits=bits)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integers that ``x`` is rounded to, int16 [..., D]."""
        return self._levels(x, self._scale(x)).to(torch.int16)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"bits={self.bits}"

    @torch.no_grad()
    def _quantized(self, x: Tensor, *, masked: bool) -> tuple[Tensor, Tensor | None]:
        # Nothing is farther than half a step beyond the range, so that every mask passes everywhere.
        scale = self._scale(x)
        return self._levels(x, scale).mul_(scale), None

    def _scale(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / (self.q_max + 0.5)
        return torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)

    def _levels(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x / scale).clamp_(-self.q_max - 1, self.q_max).round_()
