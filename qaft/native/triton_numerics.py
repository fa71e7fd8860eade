"""What Triton kernels need to have the bits of torch: roundings and maxima that are IEEE's, also in its interpreter."""

# Kernels are Python for Triton's compiler alone, whose stubs do not describe it.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds a number below 2^22 to an integer, ties to even."""

_ABSOLUTE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def round_even(x):
    """Return ``x`` rounded to an integer, ties to even, for ``|x| < 2^22``; infinities and NaN stay."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """Return fp32 ``x`` in another dtype, ties to even.

    bf16 is rounded here: the interpreter would truncate, and what is rounded already is the same in both.
    """
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def absolute_maximum(x):
    """Return ``max |x|`` over the last axis, NaN where one is: as integers, NaN are the largest numbers."""
    return tl.max(x.to(tl.int32, bitcast=True) & _ABSOLUTE, axis=-1).to(tl.float32, bitcast=True)


@triton.jit
def at_least(x, bound):
    """Return the larger number, NaN where one is."""
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(x, bound):
    """Return the smaller number, NaN where one is."""
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def extremes_with_zero(x, absmax):
    """Return the least and the largest number over the last axis and 0; both NaN where ``absmax`` is."""
    low, high = at_most(tl.min(x, axis=-1), 0.0), at_least(tl.max(x, axis=-1), 0.0)
    return tl.where(absmax == absmax, low, absmax), tl.where(absmax == absmax, high, absmax)


@triton.jit
def _probe_kernel(x_ptr):
    tl.store(x_ptr, round_even(tl.load(x_ptr)))


def probe(device: torch.device) -> None:
    """Compile and run a kernel on ``device``, whose failure says that none will run there."""
    x = torch.full((1,), 2.5, device=device)
    with torch.cuda.device_of(x):
        _probe_kernel[(1,)](x)
    if x.item() != 2:
        raise RuntimeError(f"Triton rounds 2.5 to {x.item()}")
