"""Fake quantization of an integer grid on a CPU in one pass over memory: the reference formulas, compiled.

``Range.levels`` is compiled as it stands by ``torch.compile``, so there is nothing to keep equal by hand. Codes are
those of the reference bit for bit: Inductor lets the C++ compiler neither contract products and sums nor reorder them,
maxima do not depend on an order, and casts to 16-bit scales are kept (it drops them by default). Sums do depend on it,
so ranges that sum over a group are not compiled.

Compiling takes some seconds once per range; later shapes reuse it.

Shapes: O = out_features, G = groups, N = weights per group.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qaft.quant.ranges import Range

_OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}


def check_fused(range_: Range) -> None:
    """Raise where the compiled pass would not be the reference, or cannot be compiled.

    Raises:
        ValueError: the range sums over a group, or there is no C++ compiler.
    """
    if range_.kind in ("mse", "rms"):
        raise ValueError(
            f"fused=True: range {range_.kind} sums over a group, in another order when compiled; use absmax or "
            "signed_absmax, or leave fused out"
        )
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    if not any(name and shutil.which(name) for name in compilers):
        raise ValueError("fused=True needs a C++ compiler (g++ or clang++, or CXX): install one, or leave fused out")


def fused_quantize(groups: Tensor, range_: Range, *, ste: str, masked: bool) -> tuple[Tensor, Tensor | None]:
    """Return the values of ``groups`` on their grids, fp32 [O, G, N], and with ``masked`` where the gradient passes.

    Args:
        groups: [O, G, N] on a CPU, any floating dtype.
        range_: one that ``check_fused`` accepts.
        ste: "clamp" or "trust"; read with ``masked`` only.
        masked: whether to return a bool mask [O, G, N], else None.
    """
    return _compiled(range_, ste, masked)(groups.flatten(0, 1).unsqueeze(0).float())


@cache
def _compiled(range_: Range, ste: str, masked: bool) -> Any:
    def quantize(groups: Tensor) -> tuple[Tensor, Tensor | None]:
        levels, scale, _, passes = range_.levels(groups, ste=ste, masked=masked)
        return levels * scale.unsqueeze(-1), passes

    return torch.compile(quantize, fullgraph=True, dynamic=True, options=_OPTIONS)
