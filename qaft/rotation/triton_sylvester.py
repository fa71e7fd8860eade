"""The butterflies of ``sylvester.py`` on GPUs, in Triton: every block of the axis is read once and written once.

One program holds some blocks in registers. A stage splits them into the halves of each pair and joins sums and
differences, so that each number takes part in exactly the additions of the reference, in its order.

Bound: 2 reads or writes of the tensor; log2(n) additions per number are below what a GPU does meanwhile.
"""

# Kernels are Python for Triton's compiler alone, whose stubs do not describe it.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qaft.native.triton_numerics import cast

_TILE = 2048
"""Numbers per program: 16 for each thread of 4 warps, which leaves registers for both halves of a stage."""

MAX_SIZE = 1 << 13
"""The largest block that stays in the registers of one program (8 warps and more)."""


@triton.jit
def butterflies(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Return ``x H`` for fp32 ``x`` [ROWS, SIZE]."""
    for stage in tl.static_range(SIZE.bit_length() - 1):
        pairs = tl.reshape(x, (ROWS, SIZE >> (stage + 1), 2, 1 << stage))
        first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        joined = tl.join(first + second, first - second)
        x = tl.reshape(tl.permute(joined, (0, 1, 3, 2)), (ROWS, SIZE))
    return x


@triton.jit
def _rows_kernel(x_ptr, y_ptr, num_rows, scale, ROWS: tl.constexpr, SIZE: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    where = rows[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (rows < num_rows)[:, None]
    x = tl.load(x_ptr + where, mask=inside, other=0.0).to(tl.float32)
    y = butterflies(x, ROWS, SIZE) * scale
    tl.store(y_ptr + where, cast(y, y_ptr.dtype.element_ty), mask=inside)


def sylvester_rows(x: Tensor, *, scale: float) -> Tensor:
    """Return ``scale * (x H)`` along the last axis, a power of two from 2 to ``MAX_SIZE``; as ``sylvester.reference``.

    Args:
        x: fp32 or 16 bits, on a GPU.
        scale: rounded to fp32.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    size = x.shape[-1]
    num_rows, rows = x.numel() // size, max(1, _TILE // size)
    grid = (triton.cdiv(num_rows, rows),)
    num_warps = 4 if size <= _TILE else 16
    with torch.cuda.device_of(x):
        _rows_kernel[grid](x, y, num_rows, scale, ROWS=rows, SIZE=size, num_warps=num_warps, enable_fp_fusion=False)
    return y
