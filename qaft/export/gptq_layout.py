"""The tensors of GPTQ checkpoints: codes of a word lie along the input, everything else along the output.

    qweight   int32 [I b / 32, O]   word r, bits [j b, (j + 1) b): input 32 r / b + j, as u = q + 2^(b-1)
    scales    fp16 [G, O]
    qzeros    int32 [G, ceil(O b / 32)]   u of zero; format gptq holds one less, format gptq_v2 the value itself
    g_idx     int32 [I]             the group of each input: i // group size
    w = scales (u - zero)

One less than 0 would borrow from the next zero point of its word, so asymmetric grids are written as gptq_v2. Scales of
bf16 models are numbers of fp16 too, from 2^-17 on.

Source: AutoGPTQ for format gptq; GPTQModel 7.7 for gptq_v2, ``nn_modules/qlinear``.
Shapes: O = out_features, I = in_features, G = groups along I, b = bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qaft.errors import ExportError
from qaft.quant.base import QTensor
from qaft.quant.packing import pack_int32

WORD_BITS = 32


def gptq_tensors(name: str, codes: QTensor, bits: int) -> dict[str, Tensor]:
    """Return the stored tensors of a layer, by the rest of their names.

    Args:
        name: the layer, for messages.
        codes: on an affine grid of 4 or 8 bits.
        bits: of the codes.

    Raises:
        ExportError: a scale is no number of fp16.
    """
    num_groups, width = codes.scale.shape[1], codes.values.shape[1]
    offset = 1 << (bits - 1)
    if codes.zero_point is None:
        # Format gptq: one less than the code of zero.
        zeros = torch.full((num_groups, codes.values.shape[0]), -1, dtype=torch.int8)
    else:
        zeros = codes.zero_point.T
    per_word = WORD_BITS // bits
    zeros = F.pad(zeros.cpu(), (0, -zeros.shape[1] % per_word), value=-offset)
    return {
        "qweight": pack_int32(codes.values, bits).T.contiguous(),
        "qzeros": pack_int32(zeros.contiguous(), bits),
        "scales": _half(name, codes).T.contiguous(),
        "g_idx": (torch.arange(width) // (width // num_groups)).int(),
    }


def _half(name: str, codes: QTensor) -> Tensor:
    """Return the scales as fp16 [O, G]; a group of zeros has any scale, so the smallest normal one."""
    half = codes.scale.to(torch.float16)
    zero_point = 0 if codes.zero_point is None else codes.zero_point.unsqueeze(-1)
    empty = (codes.values.unflatten(-1, (codes.scale.shape[1], -1)) == zero_point).all(-1)
    lost = (half.float() != codes.scale.float()) & ~empty
    if lost.any():
        worst = float(codes.scale[lost][0])
        raise ExportError(
            f"{name}: {int(lost.sum())} scales are no numbers of fp16, which holds them in this format (the first is "
            f"{worst:.6g}): train with scales in 16 bits (model.dtype bfloat16, or float16 for weights as small as "
            "these), or export `compressed-tensors`"
        )
    return half.masked_fill(empty & (half == 0), torch.finfo(torch.float16).tiny)
