"""Frozen linear layers by the storage names that recipes use."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from qaft.bases.affine import AffineBase
from qaft.bases.base import FrozenLinear, LinearSpec, Matmul
from qaft.bases.dense import DenseBase
from qaft.quant.base import Quantizer
from qaft.sections import Storage

__all__ = [
    "DENSE_STORAGES",
    "STORAGES",
    "AffineBase",
    "DenseBase",
    "FrozenLinear",
    "LinearSpec",
    "Matmul",
    "build_base",
]

STORAGES: tuple[str, ...] = get_args(Storage)

DENSE_STORAGES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build_base(
    storage: str,
    weight: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    grid_quantizer: Quantizer | None = None,
    double_quant: bool = False,
) -> FrozenLinear:
    """Return ``weight`` frozen in the given storage.

    Args:
        storage: one of ``STORAGES``.
        weight: [O, I], floating point.
        bias: [O] or None; kept in ``dtype``.
        dtype: the dtype the layer computes in.
        grid_quantizer: the grid of ``int4`` and ``int8_group``; not used by the others.
        double_quant: nf4 and fp4 only: 8-bit block scales.

    Raises:
        ValueError: the storage is unknown or its grid is missing, double_quant has no meaning for it, or the grid does
            not fit the weight.
    """
    bias = None if bias is None else bias.to(dtype)
    if double_quant and storage not in ("nf4", "fp4"):
        raise ValueError(f"double_quant: {storage!r} has no block scales to quantize; only nf4 and fp4 have")
    if storage in DENSE_STORAGES:
        return DenseBase(weight.to(DENSE_STORAGES[storage]), bias, dtype=dtype)
    if storage in ("int4", "int8_group"):
        if grid_quantizer is None:
            raise ValueError(f"storage {storage!r} needs grid_quantizer, the grid of its codes")
        return AffineBase.from_weight(weight, bias, grid_quantizer, dtype=dtype)
    # bitsandbytes loads its native library on import (seconds, and log lines): only when it is used.
    from qaft.bases.bnb import FourBitBase, Int8Base

    if storage == "int8":
        return Int8Base.from_weight(weight, bias, dtype=dtype)
    if storage == "nf4" or storage == "fp4":
        return FourBitBase.from_weight(weight, bias, dtype=dtype, quant_type=storage, double_quant=double_quant)
    raise ValueError(f"storage {storage!r} is not known: must be one of {', '.join(STORAGES)}")
