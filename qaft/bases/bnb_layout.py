"""Weights as checkpoints of bitsandbytes hold them: trained codes and scales as they are, nothing derived again.

    nf4, fp4   weight uint8 [N / 2, 1], the first of two codes in the high half;  weight.absmax [B];  weight.quant_map
               [16];  weight.quant_state.bitsandbytes__nf4 or __fp4: block size, shape and dtype as JSON;  with double
               quantization weight.nested_absmax, weight.nested_quant_map
    int8       weight int8 [O, I];  SCB fp32 [O] = 127 s;  weight_format uint8 [] = 0 (rows);  w = code SCB / 127

The library's 4-bit kernels for CPUs (0.50) compute with scales and inputs rounded to bf16, and read wrong scales where
a row ends inside a block. Its layers are therefore compared by the values that they hold, not by what they compute.

Shapes: O = out_features, I = in_features, N = O * I, B = ceil(N / block size).
Source: bitsandbytes 0.50, ``QuantState.as_dict`` and ``nn/modules.py``.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from qaft.bases.base import FrozenLinear
from qaft.bases.bnb import FourBitBase, Int8Base
from qaft.quant.base import QTensor
from qaft.quant.packing import pack_nibbles

_ROW_MAJOR = 0


def four_bit_tensors(quantized: QTensor, *, dtype: torch.dtype, quant_type: str) -> dict[str, Tensor]:
    """Return the stored tensors of codes of a code book of bitsandbytes, by the rest of their names.

    Args:
        quantized: what a grid of this code book returned.
        dtype: the dtype that readers round the weight to.
        quant_type: the code book.
    """
    # A row has whole blocks, so no byte crosses two rows.
    packed = pack_nibbles(quantized.values).view(-1, 1)
    num_rows, width = quantized.values.shape
    state = bnb.QuantState(
        absmax=quantized.scale.flatten(),
        shape=torch.Size((num_rows, width)),
        code=bnb.get_4bit_type(quant_type, device=packed.device),  # pyright: ignore[reportArgumentType]
        blocksize=width // quantized.scale.shape[1],
        quant_type=quant_type,
        dtype=dtype,
    )
    return _four_bit_tensors(packed, state)


def frozen_four_bit_tensors(base: FourBitBase) -> dict[str, Tensor]:
    """Return the stored tensors of a frozen layer: its own bytes."""
    state = base.quant_state()
    state.code = bnb.get_4bit_type(base.quant_type, device=base.packed.device)  # pyright: ignore[reportArgumentType]
    return _four_bit_tensors(base.packed, state)


def _four_bit_tensors(packed: Tensor, state: bnb.QuantState) -> dict[str, Tensor]:
    return {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}


def int8_tensors(codes: Tensor, absmax: Tensor) -> dict[str, Tensor]:
    """Return the stored tensors of int8 codes [O, I] and what code 127 stands for in each row, fp32 [O]."""
    return {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(_ROW_MAJOR, dtype=torch.uint8)}


def held_by(module: Any) -> FrozenLinear:
    """Return a layer with the weight that a loaded ``Linear4bit`` or ``Linear8bitLt`` of bitsandbytes holds.

    4-bit weights are rounded to the dtype that the checkpoint names, as the library rounds them; int8 weights are not
    rounded, because its int8 product never forms them.

    Raises:
        ValueError: the module has run on a CPU, where it replaces its scales by rounded ones.
    """
    bias = None if module.bias is None else module.bias.detach()
    if type(module).__name__ == "Linear8bitLt":
        absmax = module.weight.SCB if module.state.SCB is None else module.state.SCB
        codes = module.weight.data if module.state.CB is None else module.state.CB
        return Int8Base(codes, absmax.float(), bias, dtype=torch.float32)
    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(f"{module}: bitsandbytes has rounded its scales in a forward pass on a CPU; load it again")
    return FourBitBase(module.weight.data, state, bias, dtype=state.dtype)
