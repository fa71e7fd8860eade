"""The affine grid one number at a time in Python floats, and the gradient of a quantized linear layer in fp64.

Every rounding is written out: to fp32 where the definition computes in fp32, to the significant bits of a stored scale.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

SIGNIFICANT_BITS = {torch.float32: 16, torch.bfloat16: 8, torch.float16: 11}
SMALLEST_NORMAL = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-14}


def to_fp32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def stored_scale(scale: float, dtype: torch.dtype) -> float:
    scale = max(scale, SMALLEST_NORMAL[dtype])
    mantissa, exponent = math.frexp(scale)
    units = mantissa * 2 ** SIGNIFICANT_BITS[dtype]
    whole = math.floor(units) if dtype == torch.float32 else round(units)
    return math.ldexp(whole, exponent - SIGNIFICANT_BITS[dtype])


def previous_scale(scale: float, dtype: torch.dtype) -> float:
    _, exponent = math.frexp(scale)
    unit = math.ldexp(1.0, exponent - SIGNIFICANT_BITS[dtype])
    return scale - (unit if math.frexp(scale - unit)[1] == exponent else unit / 2)


@dataclass(frozen=True)
class Group:
    codes: list[int]
    scale: float
    zero_point: int


def quantize_group(weights: list[float], bits: int, symmetric: bool, dtype: torch.dtype) -> Group:
    q_max = 2 ** (bits - 1) - 1
    if symmetric:
        scale = stored_scale(to_fp32(max(abs(w) for w in weights) / q_max), dtype)
        return Group([round(to_fp32(w / scale)) for w in weights], scale, 0)
    q_min, span = -q_max - 1, 2**bits - 1
    low, high = min(0.0, *weights), max(0.0, *weights)
    scale = stored_scale(to_fp32(to_fp32(high - low) / span), dtype)
    used = round(to_fp32(high / scale)) - round(to_fp32(low / scale))
    if used < span and scale > SMALLEST_NORMAL[dtype]:
        scale = previous_scale(scale, dtype)
    zero_point = q_min + min(span, -round(to_fp32(low / scale)))
    codes = [min(q_max, max(q_min, round(to_fp32(w / scale)) + zero_point)) for w in weights]
    return Group(codes, scale, zero_point)


def linear_gradient(x: Tensor, effective_weight: Tensor, target: Tensor) -> Tensor:
    """Return d/dW of ``sum((x W.T - target)^2)`` at the effective weight, in fp64 and element by element of W."""
    x, weight, target = x.double(), effective_weight.double(), target.double()
    error = x @ weight.T - target
    rows = [
        [2 * sum(error[t, o] * x[t, i] for t in range(len(x))) for i in range(x.shape[1])] for o in range(len(weight))
    ]
    return torch.tensor(rows, dtype=torch.float64)
