"""A packed layer as a checkpoint stores it: one row of bytes per output channel, so that rows can be exchanged.

    compressed-tensors   weight_packed [O, W]      weight_scale [O, G]       weight_zero_point, see below
                         weight [O, I]             weight_scale [O, 1]       int8, where inputs are int8 too (W8A8)
    bitsandbytes, 4 bit  weight [O, I / 2]         weight.absmax [O, I / g]  (stored flat)

A row of codes and its scales follow from that row of the weight alone, because groups and blocks end where a row ends.
Zero points are the exception in storage: a word of compressed-tensors holds those of several rows. Here they are
int8 [O, G], one by one.

Shapes: O = out_features, I = in_features, W = words per row, G = groups along I, g = weights per block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qaft.bases.base import FrozenLinear
from qaft.bases.dense import DenseBase
from qaft.quant.base import QTensor
from qaft.quant.packing import pack_int32, pack_nibbles, pack_zero_point

ZERO_POINT = "weight_zero_point"
"""The part that files pack along the rows."""


def rows_of(codes: QTensor, bits: int, *, packed: bool = True) -> dict[str, Tensor]:
    """Return part -> tensor with one row per output channel, of an affine grid or a code book.

    The name of a part is what follows the module path in the checkpoint.

    Args:
        codes: of the layer.
        bits: of a code.
        packed: affine codes are packed into words; False: one int8 each, see ``PackedGrid.packed``.
    """
    if codes.codebook is not None:
        return {"weight": pack_nibbles(codes.values), "weight.absmax": codes.scale.float()}
    values = {"weight_packed": pack_int32(codes.values, bits)} if packed else {"weight": codes.values}
    rows = {**values, "weight_scale": codes.scale}
    return rows if codes.zero_point is None else {**rows, ZERO_POINT: codes.zero_point}


def stored_codes(codes: QTensor, bits: int, *, packed: bool = True) -> dict[str, Tensor]:
    """Return part -> tensor as a checkpoint holds the codes; the order of the bytes is that of the file."""
    stored = rows_of(codes, bits, packed=packed)
    if "weight_packed" in stored:
        stored["weight_shape"] = torch.tensor(codes.values.shape)
    if codes.zero_point is not None:
        stored[ZERO_POINT] = pack_zero_point(codes.zero_point, bits)
    return stored


def stored_base(base: FrozenLinear) -> dict[str, Tensor]:
    """Return part -> tensor as a checkpoint holds a frozen layer: dense, or of bitsandbytes."""
    if isinstance(base, DenseBase):
        return {"weight": base.weight.to(base.dtype)}
    from qaft.bases.bnb import FourBitBase, Int8Base

    if isinstance(base, FourBitBase):
        parts = {"weight": base.packed, "weight.absmax": base.absmax}
        return parts if base.nested_absmax is None else {**parts, "weight.nested_absmax": base.nested_absmax}
    assert isinstance(base, Int8Base)
    return {"weight": base.codes, "SCB": base.absmax}
