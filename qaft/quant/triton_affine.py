"""The absmax ranges of ``ranges.py`` on GPUs, in Triton: one pass over the weights, with the codes of the reference.

Every operation is the reference's, in IEEE single precision: quotients are rounded to nearest (Triton's ``/`` is not),
ties go to even, scales are rounded to what is stored, and a NaN makes its group NaN. Maxima and minima have no order.

Bound: a read of the weights, a write of the values, and of the mask (one byte each) where there is one.
Shapes: a program holds some groups, [GROUPS, N]; N = weights per group, padded to a power of two.
"""

# Kernels are Python for Triton's compiler alone, whose stubs do not describe it.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qaft.native.triton_numerics import absolute_maximum, at_least, at_most, cast, extremes_with_zero, round_even
from qaft.quant.ranges import Range

_TILE = 1024
"""Weights per program: 8 for each thread of 4 warps."""

_LARGEST_GROUP = 1 << 15
"""Rows without groups are groups; a wider one would not fit the registers of a program."""


@triton.jit
def _stored(scale, SMALLEST: tl.constexpr, STORAGE: tl.constexpr):
    scale = at_least(scale, SMALLEST)
    if STORAGE == "fp32":
        return (scale.to(tl.int32, bitcast=True) & -256).to(tl.float32, bitcast=True)
    return cast(scale, tl.bfloat16 if STORAGE == "bf16" else tl.float16).to(tl.float32)


@triton.jit
def _next_smaller(scale, STORAGE: tl.constexpr):
    dropped = 256 if STORAGE == "fp32" else (65536 if STORAGE == "bf16" else 8192)
    return (scale.to(tl.int32, bitcast=True) - dropped).to(tl.float32, bitcast=True)


@triton.jit
def _asymmetric(low, high, clip, SPAN: tl.constexpr, SMALLEST: tl.constexpr, STORAGE: tl.constexpr):
    scale = _stored(tl.div_rn((high - low) * clip, SPAN * 1.0), SMALLEST, STORAGE)
    used = round_even(tl.div_rn(high, scale)) - round_even(tl.div_rn(low, scale))
    unused = (used < SPAN) & (scale > SMALLEST) & (scale < float("inf"))
    scale = tl.where(unused, _next_smaller(scale, STORAGE), scale)
    reaches_low = round_even(tl.div_rn(low, scale))
    reaches_high = round_even(tl.div_rn(high, scale)) - SPAN
    lowest = round_even(tl.div_rn(low * clip, scale))
    lowest = at_least(at_most(lowest, reaches_high), reaches_low)
    return scale, at_least(lowest, -SPAN * 1.0)


@triton.jit
def _levels(w, scale, lowest, SPAN: tl.constexpr):
    low = lowest[:, None]
    return at_most(at_least(round_even(tl.div_rn(w, scale[:, None])), low), low + SPAN)


@triton.jit
def _fit(w, inside, clip, SYMMETRIC: tl.constexpr, CLIPPED: tl.constexpr, Q_MIN: tl.constexpr, Q_MAX: tl.constexpr,
         SMALLEST: tl.constexpr, STORAGE: tl.constexpr):  # fmt: skip
    """Return scales and lowest levels; a clipped group on an unclipped grid keeps that."""
    absmax = absolute_maximum(w)
    low, high = extremes_with_zero(w, absmax)
    SPAN: tl.constexpr = Q_MAX - Q_MIN
    if SYMMETRIC:
        scale = _stored(tl.div_rn(absmax * clip, Q_MAX * 1.0), SMALLEST, STORAGE)
        lowest = tl.full(scale.shape, Q_MIN, tl.float32)
    else:
        scale, lowest = _asymmetric(low, high, clip, SPAN, SMALLEST, STORAGE)
    if CLIPPED:
        for end in tl.static_range(2 if SYMMETRIC else 1):
            if SYMMETRIC:
                other = _stored(tl.div_rn(absmax, (-Q_MIN if end == 0 else Q_MAX) * 1.0), SMALLEST, STORAGE)
                other_lowest = tl.full(other.shape, Q_MIN, tl.float32)
            else:
                other, other_lowest = _asymmetric(low, high, 1.0, SPAN, SMALLEST, STORAGE)
            differs = (_levels(w, other, other_lowest, SPAN) * other[:, None] != w) & inside
            exact = tl.max(differs.to(tl.int32), axis=-1) == 0
            scale, lowest = tl.where(exact, other, scale), tl.where(exact, other_lowest, lowest)
    return scale, lowest


@triton.jit
def _kernel(w_ptr, values_ptr, mask_ptr, num_groups, clip, margin, N: tl.constexpr, PADDED: tl.constexpr,
            GROUPS: tl.constexpr, SYMMETRIC: tl.constexpr, CLIPPED: tl.constexpr, MASKED: tl.constexpr,
            Q_MIN: tl.constexpr, Q_MAX: tl.constexpr, SMALLEST: tl.constexpr, STORAGE: tl.constexpr):  # fmt: skip
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    member = tl.arange(0, PADDED)[None, :]
    where = groups[:, None] * N + member
    inside = (groups < num_groups)[:, None] & (member < N)
    # A padded zero changes neither the largest magnitude nor a range that includes 0.
    w = tl.load(w_ptr + where, mask=inside, other=0.0).to(tl.float32)
    scale, lowest = _fit(w, inside, clip, SYMMETRIC, CLIPPED, Q_MIN, Q_MAX, SMALLEST, STORAGE)
    values = _levels(w, scale, lowest, Q_MAX - Q_MIN) * scale[:, None]
    tl.store(values_ptr + where, values, mask=inside)
    if MASKED:
        scaled, low = tl.div_rn(w, scale[:, None]), lowest[:, None]
        passes = (scaled >= low - margin) & (scaled <= low + (Q_MAX - Q_MIN) + margin)
        tl.store(mask_ptr + where, passes, mask=inside)


def supports(range_: Range, group_size: int) -> bool:
    """Return whether there is a kernel: range absmax, and groups that fit the registers of a program."""
    return range_.kind == "absmax" and group_size <= _LARGEST_GROUP


def fake_quantize(groups: Tensor, range_: Range, *, ste: str, masked: bool) -> tuple[Tensor, Tensor | None]:
    """Return the values of ``groups`` on their grids, fp32 [O, G, N], and with ``masked`` where the gradient passes.

    Args:
        groups: [O, G, N], fp32 or 16 bits, on a GPU.
        range_: one that ``supports`` accepts.
        ste: "clamp" or "trust"; read with ``masked`` only.
        masked: whether to return a bool mask [O, G, N], else None.
    """
    groups = groups.contiguous()
    values = torch.empty(groups.shape, dtype=torch.float32, device=groups.device)
    mask = torch.empty(groups.shape, dtype=torch.bool, device=groups.device) if masked else None
    size = groups.shape[-1]
    padded = triton.next_power_of_2(size)
    count, per_program = groups.numel() // size, max(1, _TILE // padded)
    storage = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[range_.storage.dtype]
    with torch.cuda.device_of(groups):
        _kernel[(triton.cdiv(count, per_program),)](
            groups, values, values if mask is None else mask, count, range_.clip, 0.5 if ste == "trust" else 0.0,
            N=size, PADDED=padded, GROUPS=per_program, SYMMETRIC=range_.symmetric, CLIPPED=range_.clip < 1,
            MASKED=mask is not None, Q_MIN=range_.q_min, Q_MAX=range_.q_max, SMALLEST=range_.storage.smallest,
            STORAGE=storage, num_warps=4 if padded <= 4096 else 16, enable_fp_fusion=False,
        )  # fmt: skip
    return values, mask
