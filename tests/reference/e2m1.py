"""Block-scaled 4-bit floats one number at a time in Python floats."""

from __future__ import annotations

import math

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nearest(value: float) -> float:
    """Return the e2m1 number nearest to ``value``; of two, the one with the even bit pattern."""
    size = abs(value)
    distance = [abs(size - level) for level in LEVELS]
    code = min(range(8), key=lambda c: (distance[c], c % 2))
    return math.copysign(LEVELS[code], value)


def mx_exponent(absmax: float) -> int:
    """Return e of s = 2^e: the largest magnitude, in units of s, lies in [3.5, 7)."""
    if absmax == 0:
        return -126
    return max(math.floor(math.log2(absmax / 3.5)), -126)


def nv_tensor_exponent(absmax: float) -> int:
    """Return the least e with ``absmax <= 464 * 6 * 2^e``."""
    return max(math.ceil(math.log2(absmax / (464 * 6))), -116)
