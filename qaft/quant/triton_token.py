"""The grids of ``activation.py`` on GPUs, in Triton: one program per token, which is read once and written once.

Bound: a read and a write of the activations, and of the mask (one byte each) where there is one.
Shapes: tokens [T, D]; a program holds one token, padded to a power of two.
"""

# Kernels are Python for Triton's compiler alone, whose stubs do not describe it.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qaft.native.triton_numerics import absolute_maximum, at_least, at_most, cast, extremes_with_zero, round_even

MAX_WIDTH = 1 << 15
"""The widest token that stays in the registers of one program."""


@triton.jit
def _range(x, clip, TOP: tl.constexpr, SYMMETRIC: tl.constexpr, SMALLEST: tl.constexpr):
    """Return scale, lowest and highest level of the tokens ``x`` [T, D], [T] each."""
    absmax = absolute_maximum(x)
    if SYMMETRIC:
        scale = at_least(tl.div_rn(clip * absmax, TOP * 1.0), SMALLEST)
        high = tl.full(scale.shape, TOP, tl.float32)
        return scale, -high, high
    bottom, top = extremes_with_zero(x, absmax)
    scale = at_least(tl.div_rn(clip * (top - bottom), TOP * 1.0), SMALLEST)
    low = round_even(tl.div_rn(clip * bottom, scale))
    return scale, low, low + TOP


@triton.jit
def _kernel(x_ptr, y_ptr, mask_ptr, clip, margin, D: tl.constexpr, PADDED: tl.constexpr, TOP: tl.constexpr,
            SYMMETRIC: tl.constexpr, CLAMPED: tl.constexpr, MASKED: tl.constexpr, SMALLEST: tl.constexpr):  # fmt: skip
    member = tl.arange(0, PADDED)[None, :]
    where = tl.program_id(0).to(tl.int64) * D + member
    # A padded zero changes neither the largest magnitude nor a range that includes 0.
    x = tl.load(x_ptr + where, mask=member < D, other=0.0).to(tl.float32)
    scale, low, high = _range(x, clip, TOP, SYMMETRIC, SMALLEST)
    low, high = low[:, None], high[:, None]
    scaled = x * tl.div_rn(1.0, scale)[:, None]
    levels = round_even(scaled)
    if CLAMPED:
        levels = at_most(at_least(levels, low), high)
    tl.store(y_ptr + where, cast(levels * scale[:, None], y_ptr.dtype.element_ty), mask=member < D)
    if MASKED:
        tl.store(mask_ptr + where, (scaled >= low - margin) & (scaled <= high + margin), mask=member < D)


def fake_quantize_tokens(
    tokens: Tensor, *, bits: int, symmetric: bool, clip: float, ste: str, masked: bool
) -> tuple[Tensor, Tensor | None]:
    """Return ``tokens`` [T, D] on the grid of each, in their dtype, and with ``masked`` where the gradient passes.

    Args:
        tokens: fp32 or 16 bits, on a GPU; D at most ``MAX_WIDTH``.
        bits: b.
        symmetric: no zero point.
        clip: c.
        ste: "clamp" or "trust"; read with ``masked`` only.
        masked: whether to return a bool mask, else None.
    """
    tokens = tokens.contiguous()
    out = torch.empty_like(tokens)
    mask = torch.empty(tokens.shape, dtype=torch.bool, device=tokens.device) if masked else None
    num_tokens, width = tokens.shape
    padded = triton.next_power_of_2(width)
    top = (1 << (bits - 1)) - 1 if symmetric else (1 << bits) - 1
    if num_tokens:
        with torch.cuda.device_of(tokens):
            _kernel[(num_tokens,)](
                tokens, out, out if mask is None else mask, clip, 0.5 if ste == "trust" else 0.0,
                D=width, PADDED=padded, TOP=top, SYMMETRIC=symmetric, CLAMPED=not symmetric or clip < 1,
                MASKED=mask is not None, SMALLEST=torch.finfo(torch.float32).tiny,
                num_warps=4 if padded <= 4096 else 16,
                # x / s + 1.5 * 2^23 in one rounding would round some values to the other side.
                enable_fp_fusion=False,
            )  # fmt: skip
    return out, mask
