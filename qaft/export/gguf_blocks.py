"""Weights as the bytes of GGUF tensors: codes and scales copied into ggml's block layouts, never derived again.

    Q4_0    fp16 d, 16 bytes: codes j and j + 16 in the low and high nibble of byte j, each plus 8       w^ = d q
    Q8_0    fp16 d, 32 bytes: int8 codes                                                                 w^ = d q
    MXFP4   e8m0 e, 16 bytes: bit patterns of e2m1, j and j + 16 likewise                         w^ = 2^(e-127) level

An integer grid without zero points whose scales are fp16 numbers is one of the first two: codes of up to 4 bits are
those of Q4_0, wider ones those of Q8_0, and a group of 64 or 128 is several blocks with the same scale.

Shapes: O = out_features, I = in_features, G = groups along I, N = I / 32 blocks per row.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qaft.bases.affine import AffineBase
from qaft.errors import ExportError
from qaft.quant.affine import Affine
from qaft.quant.base import QTensor, Quantizer
from qaft.quant.e2m1 import MXFP4
from qaft.quant.ggml import BLOCK, GgmlBlocks

_NIBBLES = 4
"""Bits of a code of Q4_0."""

PLAIN_TYPES = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


def type_of_grid(name: str, quantizer: Quantizer, in_features: int) -> GGMLQuantizationType:
    """Return the type that holds the codes of ``quantizer``.

    Args:
        name: the layer, for messages.
        quantizer: a trained layer's grid.
        in_features: I.

    Raises:
        ExportError: GGUF has no type for this grid.
    """
    if isinstance(quantizer, MXFP4):
        return GGMLQuantizationType.MXFP4
    if not isinstance(quantizer, (Affine, GgmlBlocks)):
        raise ExportError(
            f"{name}: GGUF has no type for its grid {type(quantizer).__name__}; set qat.weights.kind to q4_0, q8_0, "
            "mxfp4 or int, or export `merged`"
        )
    return _integer_type(name, quantizer.bits, quantizer.group_size or in_features, symmetric=quantizer.symmetric)


def type_of_base(name: str, base: AffineBase) -> GGMLQuantizationType:
    """Return the type that holds the codes of a packed frozen layer.

    Raises:
        ExportError: GGUF has no type for its grid.
    """
    group_size = base.in_features // base.weight_scale.shape[1]
    return _integer_type(name, base.bits, group_size, symmetric=base.weight_zero_point is None)


def _integer_type(name: str, bits: int, group_size: int, *, symmetric: bool) -> GGMLQuantizationType:
    if not symmetric:
        raise ExportError(
            f"{name}: its grid has zero points, which the types written here (Q4_0, Q8_0) have not; set "
            "qat.weights.symmetric to true, or export `merged`"
        )
    if group_size % BLOCK:
        raise ExportError(
            f"{name}: {group_size} weights share a scale, but blocks of GGUF hold {BLOCK}; set qat.weights.group_size "
            f"to a multiple of {BLOCK}, leave the layer out of training through the grid, or export `merged`"
        )
    return GGMLQuantizationType.Q4_0 if bits <= _NIBBLES else GGMLQuantizationType.Q8_0


def packed_blocks(name: str, codes: QTensor, type: GGMLQuantizationType) -> np.ndarray:
    """Return the bytes of a quantized weight, uint8 [O, bytes of a row].

    Raises:
        ExportError: a scale is no fp16 number, so that the file would hold other weights than were trained.
    """
    values = codes.values.cpu().unflatten(1, (-1, BLOCK))
    if type == GGMLQuantizationType.Q8_0:
        body = values.view(torch.uint8)
    else:
        offset = 0 if type == GGMLQuantizationType.MXFP4 else 8
        nibbles = (values + offset).to(torch.uint8)
        body = nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4)
    scale = codes.scale if type == GGMLQuantizationType.MXFP4 else _in_fp16(name, codes.scale)
    head = scale.cpu().contiguous().view(torch.uint8).unflatten(1, (-1, scale.element_size()))
    # One scale per block; a larger group repeats its own.
    head = head.repeat_interleave(values.shape[1] // head.shape[1], dim=1)
    return torch.cat([head, body], dim=-1).flatten(1).numpy()


def _in_fp16(name: str, scale: Tensor) -> Tensor:
    stored = scale.half()
    if not torch.equal(stored.float(), scale.float()):
        raise ExportError(
            f"{name}: its scales are stored in {scale.dtype}, and not all are fp16 numbers, which the blocks of GGUF "
            "hold; train with qat.weights.kind q4_0 or q8_0 (or with an int grid and model.dtype bfloat16 or float16 "
            "where the weights are not tiny), or export `merged`"
        )
    return stored


def plain_bytes(tensor: Tensor) -> np.ndarray:
    """Return a tensor in 16 or 32 bits as uint8 [..., bytes of a row]: numpy has no bfloat16."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
