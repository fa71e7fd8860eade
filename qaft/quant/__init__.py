"""Weight grids by the names that recipes use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qaft.quant.affine import Affine
from qaft.quant.base import QTensor, Quantizer
from qaft.quant.nf4 import NF4

if TYPE_CHECKING:
    from qaft.recipe import GridSection

QUANTIZERS: dict[str, type[Quantizer]] = {
    "int": Affine,
    "nf4": NF4,
}

__all__ = ["NF4", "QUANTIZERS", "Affine", "QTensor", "Quantizer", "build_quantizer"]


def build_quantizer(grid: GridSection, *, scale_dtype: torch.dtype) -> Quantizer:
    """Return the grid that the recipe section describes.

    Args:
        grid: the validated section.
        scale_dtype: the dtype in which the scales of int grids are stored; nf4 stores fp32 whatever this is.

    Raises:
        ValueError: bitsandbytes has no nf4 blocks of this size.
    """
    if grid.kind == "nf4":
        return NF4(group_size=-1 if grid.group_size is None else grid.group_size)
    return Affine(bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric, scale_dtype=scale_dtype)
