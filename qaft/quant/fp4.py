"""FP4 of bitsandbytes: a sign, two bits of exponent and one of mantissa, scaled to [-1, 1].

    code & 7    0      1    2    3    4    5    6    7
    12 level    0   1/16    8   12    4    6    2    3      codes 8 to 15: the negatives

This is not e2m1 of MXFP4 and NVFP4 (``e2m1.py``): its smallest level is 1/16 where that has 1/2, and nothing lies
between it and 2.

Zero has two codes. bitsandbytes gives code 8 to w / a in (0, 1/384] and code 0 to w / a in (-1/384, 0], so also to a
weight of zero of either sign and to blocks of zeros. Both stand for the same weight: what ``dequantize`` returns
quantizes to the same weight again, with code 0 for all zeros. The library's GPU kernel names the two zeros the other
way around (code 8 where w < 0) and rounds its boundaries to six digits.

Source: bitsandbytes 0.50, ``functional.get_4bit_type`` and ``backends/default/ops.py``; ``csrc/kernels.cu`` for GPUs.
"""

from __future__ import annotations

from qaft.quant.codebook import CodeBook

_TWELFTHS = (0.0, 1 / 16, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


class FP4(CodeBook):
    """The FP4 grid of bitsandbytes, whose levels lie in the order of their bit patterns."""

    kind = "fp4"
    # 0 - 0 is a positive zero, as in the library's table.
    levels = tuple(level / 12 for level in (*_TWELFTHS, *(0.0 - size for size in _TWELFTHS)))
