"""A frozen weight on an affine integer grid, held as the packed words that compressed-tensors checkpoints store.

    W0 = scale * (code - zero_point),  rounded once from fp32 to the dtype of computation

``dequantize`` runs twice per layer and step. A weight of 4 bits costs at least 0.5 B read and 2 B written in bf16. Four
codes at a time are looked up in a table of 16-bit levels, straight into the result, and scaled in place, in passes
over blocks that stay in the CPU caches.
``tests/benchmarks/dequantize.py`` measures it against a copy of the result.

Shapes: O = out_features, I = in_features, G = groups along I, W = ceil(I * bits / 32).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from qaft.bases.base import FrozenLinear
from qaft.quant.base import QTensor, Quantizer, row_blocks
from qaft.quant.packing import pack_int32, pack_zero_point, unpack_int32, unpack_zero_point


@cache
def _levels_of_four_codes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return int64 [65536]: for 16 packed bits, the four levels in [-8, 7] in the 16-bit ``dtype`` (512 KiB)."""
    packed = torch.arange(1 << 16, device=device)
    codes = torch.stack([((packed >> shift) & 0xF) - 8 for shift in (0, 4, 8, 12)], dim=-1)
    return codes.to(dtype).view(torch.int64).flatten()


class AffineBase(FrozenLinear):
    """A packed affine weight; ``dequantize`` is bit-equal to ``qtensor().dequantize(dtype)``.

    Args:
        quantized: the codes of an affine grid.
        bias: [O] or None.
        bits: the width of the codes, 2 to 8.
        dtype: the dtype of ``dequantize()``.

    Attributes:
        weight_packed: int32 [O, W].
        weight_scale: [O, G], in the dtype of the grid's scales whatever dtype the module is cast to.
        weight_zero_point: int32 [ceil(O * bits / 32), G], packed along O, or None for a symmetric grid.

    Raises:
        ValueError: the codes belong to a code book, or ``bits`` is out of range.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None

    def __init__(self, quantized: QTensor, bias: Tensor | None, *, bits: int, dtype: torch.dtype) -> None:
        super().__init__()
        if quantized.codebook is not None:
            raise ValueError("AffineBase holds integer codes with scales: these are indices of a code book")
        self.out_features, self.in_features = quantized.values.shape
        self.bits = bits
        self.dtype = dtype
        zero_point = quantized.zero_point
        self.register_buffer("weight_packed", pack_int32(quantized.values, bits))
        self.register_buffer("weight_scale", quantized.scale)
        self.register_buffer("weight_zero_point", None if zero_point is None else pack_zero_point(zero_point, bits))
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_weight(
        cls, weight: Tensor, bias: Tensor | None, quantizer: Quantizer, *, dtype: torch.dtype
    ) -> AffineBase:
        """Return the base that holds ``quantizer.quantize(weight)``, weight [O, I].

        Raises:
            ValueError: the grid cannot quantize the weight; see ``Quantizer.quantize``.
        """
        return cls(quantizer.quantize(weight), bias, bits=quantizer.bits, dtype=dtype)

    def qtensor(self) -> QTensor:
        """Return codes int8 [O, I], scales [O, G] and zero points int8 [O, G] (None for symmetric grids)."""
        values = unpack_int32(self.weight_packed, self.bits, self.in_features)
        return QTensor(values, self.weight_scale, self._zero_point())

    def dequantize(self) -> Tensor:
        """Return the weight, [O, I] in ``self.dtype``; bit-identical on every call and every device."""
        scale, zero_point = self.weight_scale, self._zero_point()
        out = scale.new_empty(self.out_features, self._padded_width, dtype=self._level_dtype)
        wide = self._level_dtype != self.dtype or scale.dtype != self.dtype
        result = torch.empty_like(out[:, : self.in_features], dtype=self.dtype) if wide else out
        for rows in row_blocks(out):
            self._write_levels(self.weight_packed[rows], out[rows])
            levels = out[rows, : self.in_features].unflatten(-1, (scale.shape[1], -1))
            if zero_point is not None:
                levels.sub_(zero_point[rows].unsqueeze(-1))
            if wide:
                # A 16-bit level times an fp32 scale into a 16-bit result takes a slow path of TensorIterator.
                result[rows].view(levels.shape).copy_(levels.float().mul_(scale[rows].float().unsqueeze(-1)))
            else:
                # A product of two 16-bit numbers is formed in fp32 and rounded once.
                levels.mul_(scale[rows].unsqueeze(-1))
        return result[:, : self.in_features].contiguous()

    def extra_repr(self) -> str:
        """Return shape, dtype, bits and groups."""
        return f"{super().extra_repr()}, bits={self.bits}, groups={self.weight_scale.shape[1]}"

    @property
    def _level_dtype(self) -> torch.dtype:
        """A 16-bit dtype that holds every code exactly, also minus a zero point."""
        return self.dtype if self.dtype.itemsize == 2 else torch.bfloat16

    @property
    def _padded_width(self) -> int:
        """Columns of the packed words of a row: the last word may be filled up with codes that mean nothing."""
        return self.weight_packed.shape[1] * 8 if self.bits == 4 else self.in_features

    def _write_levels(self, packed: Tensor, out: Tensor) -> None:
        """Write the codes of ``packed`` [rows, W] to the 16-bit floats ``out`` [rows, padded width]."""
        if self.bits != 4:
            out.copy_(unpack_int32(packed, self.bits, self.in_features))
            return
        # One row of the table per row of the weight: only a two-dimensional gather runs on several threads.
        table = _levels_of_four_codes(out.dtype, packed.device).expand(packed.shape[0], -1)
        torch.gather(table, 1, packed.view(torch.uint16).long(), out=out.view(torch.int64))

    def _zero_point(self) -> Tensor | None:
        packed = self.weight_zero_point
        return None if packed is None else unpack_zero_point(packed, self.bits, self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> AffineBase:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            # Rounding a scale would move every weight off the grid it is exported on; ``.to(dtype)`` means computation.
            self.weight_scale = scale.to(self.weight_scale.device)
        return self
