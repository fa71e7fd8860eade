"""Q8_0 of GGUF: blocks of 32 inputs, levels from -127 to 127, and an fp16 scale.

    d = max |w| / 127,  q = round(w (1 / d)),  w^ = fp16(d) q

Halves round away from zero, as C's ``roundf`` does. Nothing is clipped.

Source: ggml ``quantize_row_q8_0_ref``, which ``gguf`` 0.19 (``quants.py``) reproduces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qaft.quant.ggml import GgmlBlocks

_TOP = 127


class Q8_0(GgmlBlocks):
    """The Q8_0 grid of GGUF files.

    Args:
        ste: where the gradient passes; nothing is clipped, so that all of identity, clamp and trust pass everywhere.

    Raises:
        ValueError: there is no such mask.
    """

    def __init__(self, *, ste: str = "clamp") -> None:
        super().__init__(bits=8, ste=ste)

    @property
    def kind(self) -> str:
        """The name of the format in recipes."""
        return "q8_0"

    def _block_scale(self, blocks: Tensor) -> Tensor:
        return blocks.abs().amax(-1, keepdim=True) / _TOP

    def _round(self, scaled: Tensor) -> Tensor:
        size = scaled.abs()
        # Not floor(size + 1/2): next to a half that sum rounds up to the next integer.
        whole = size.floor()
        return (whole + (2 * (size - whole)).floor_()).copysign_(scaled)

    def _limits(self) -> tuple[float, float]:
        return -torch.inf, torch.inf

    def _is_extreme(self, levels: Tensor) -> Tensor:
        return levels.abs() == _TOP
