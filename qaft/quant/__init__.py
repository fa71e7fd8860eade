"""Grids of weights, activations and the KV cache by the names that recipes use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qaft.quant.activation import TokenQuantizer
from qaft.quant.affine import Affine
from qaft.quant.base import QTensor, Quantizer
from qaft.quant.codebook import CodeBook
from qaft.quant.e2m1 import MXFP4, NVFP4
from qaft.quant.fp4 import FP4
from qaft.quant.kv import KVQuantizer, RosteKV, VllmKV
from qaft.quant.nf4 import NF4
from qaft.quant.q4_0 import Q4_0
from qaft.quant.q8_0 import Q8_0

if TYPE_CHECKING:
    from qaft.sections import GridSection

CODE_BOOKS: dict[str, type[CodeBook]] = {
    "fp4": FP4,
    "nf4": NF4,
}

QUANTIZERS: dict[str, type[Quantizer]] = {
    **CODE_BOOKS,
    "int": Affine,
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "q4_0": Q4_0,
    "q8_0": Q8_0,
}

__all__ = [
    "CODE_BOOKS",
    "FP4",
    "MXFP4",
    "NF4",
    "NVFP4",
    "Q4_0",
    "Q8_0",
    "QUANTIZERS",
    "Affine",
    "CodeBook",
    "KVQuantizer",
    "QTensor",
    "Quantizer",
    "RosteKV",
    "TokenQuantizer",
    "VllmKV",
    "build_quantizer",
]


def build_quantizer(grid: GridSection, *, scale_dtype: torch.dtype) -> Quantizer:
    """Return the weight grid that the recipe section describes.

    Args:
        grid: the validated section.
        scale_dtype: the dtype in which the scales of int grids are stored; the other formats have their own.

    Raises:
        ValueError: bitsandbytes has no blocks of this size.
    """
    if grid.kind in CODE_BOOKS:
        return CODE_BOOKS[grid.kind](group_size=-1 if grid.group_size is None else grid.group_size)
    if grid.kind == "int":
        return Affine(
            bits=grid.bits,
            group_size=grid.group_size,
            symmetric=grid.symmetric,
            range=grid.range,
            clip=grid.clip,
            ste=grid.ste,
            fused=grid.fused,
            scale_dtype=scale_dtype,
        )
    return QUANTIZERS[grid.kind](ste=grid.ste)
