"""Q4_0 of GGUF: blocks of 32 inputs, 16 levels from -8 to 7, and an fp16 scale with the sign of the largest weight.

    d = m / -8,  m the weight of largest magnitude (the first of them)
    q = min(15, trunc(w (1 / d) + 8.5)) - 8,  w^ = fp16(d) q

The largest weight is level -8, exact up to the rounding of d; its opposite would be level 8, which is clipped to 7.
Halves round up, as in ggml.

Source: ggml ``quantize_row_q4_0_ref``, which ``gguf`` 0.19 (``quants.py``) reproduces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qaft.quant.ggml import GgmlBlocks

_LOW, _HIGH = -8, 7


class Q4_0(GgmlBlocks):
    """The Q4_0 grid of GGUF files. Scales are negative where the largest weight is positive.

    Args:
        ste: where the gradient passes: identity, clamp or trust.

    Raises:
        ValueError: there is no such mask.
    """

    def __init__(self, *, ste: str = "clamp") -> None:
        super().__init__(bits=4, ste=ste)

    @property
    def kind(self) -> str:
        """The name of the format in recipes."""
        return "q4_0"

    def _block_scale(self, blocks: Tensor) -> Tensor:
        return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / _LOW

    def _round(self, scaled: Tensor) -> Tensor:
        return (scaled + 8.5).trunc_().clamp_(max=15).sub_(8)

    def _limits(self) -> tuple[float, float]:
        # The lowest level is the extreme, which only the rounding of 1 / d puts outside.
        return -torch.inf, _HIGH

    def _is_extreme(self, levels: Tensor) -> Tensor:
        return levels == _LOW
