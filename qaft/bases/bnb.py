"""Frozen weights in the 4- and 8-bit formats of bitsandbytes, held as plain buffers that save, load and move.

    nf4, fp4:  W0 = level[code] * absmax        one absmax for each 64 weights in storage order
    int8:      W0 = code / 127 * absmax         one absmax per output row

bitsandbytes' own ``Linear4bit`` writes quantization state that it cannot load (bitsandbytes#1946). Here the state is
ordinary buffers, so ``state_dict`` round trips are exact; products are the default ones of ``FrozenLinear``.

Shapes: O = out_features, I = in_features, B = ceil(O * I / 64) blocks.
Source: QLoRA (arXiv 2305.14314) for nf4 and double quantization; LLM.int8() (arXiv 2208.07339) for int8, without its
outlier threshold, which rotated weights do not need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from qaft.bases.base import FrozenLinear
from qaft.quant.base import row_blocks

BLOCK_SIZE = 64
"""Weights per absmax of nf4 and fp4: the size of QLoRA, and the one that other tools read."""

NESTED_BLOCK_SIZE = 256
"""Block scales per second-level scale with double quantization: bitsandbytes fixes it."""

_PIECE = BLOCK_SIZE * 2048
"""Weights quantized to 4 bits at a time on CPUs; whole blocks, and an even number of codes."""

_INT8_MAX = 127.0
_ROW_MAJOR = 0


class _PackedBase(FrozenLinear):
    """Storage whose scales keep their dtype: ``.to(dtype)`` means the dtype of computation, not another grid."""

    def _apply(self, fn: Any, recurse: bool = True) -> _PackedBase:
        stored = {name: buffer for name, buffer in self._buffers.items() if name != "bias" and buffer is not None}
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


class FourBitBase(_PackedBase):
    """``nf4`` or ``fp4``; quantizing what ``dequantize`` returns gives the same weight again (without double_quant).

    Args:
        packed: uint8 [ceil(O * I / 2), 1], two codes per byte.
        state: the block scales, as ``bitsandbytes.functional.quantize_4bit`` returns them.
        bias: [O] or None.
        dtype: the dtype of ``dequantize()``.
    """

    packed: Tensor
    absmax: Tensor
    offset: Tensor | None
    nested_absmax: Tensor | None
    nested_code: Tensor | None

    def __init__(self, packed: Tensor, state: bnb.QuantState, bias: Tensor | None, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = state.shape  # pyright: ignore[reportGeneralTypeIssues]
        self.quant_type = state.quant_type
        self.block_size = state.blocksize or BLOCK_SIZE
        self.dtype = dtype
        nested = state.state2
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("offset", None if nested is None else state.offset)
        self.register_buffer("nested_absmax", None if nested is None else nested.absmax)
        self.register_buffer("nested_code", None if nested is None else nested.code)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        quant_type: Literal["nf4", "fp4"] = "nf4",
        double_quant: bool = False,
    ) -> FourBitBase:
        """Return the nearest grid point of ``weight`` [O, I].

        Args:
            weight: any floating dtype; quantized from fp32.
            bias: [O] or None.
            dtype: the dtype of ``dequantize()``.
            quant_type: the code book.
            double_quant: store the block scales in 8 bits. Their offset is the mean over the whole tensor, so a change
                of one row would move all others: only for weights that are never merged into.
        """
        packed, absmax = _quantize_blocks(weight.detach().reshape(-1), quant_type)
        state = bnb.QuantState(absmax=absmax, shape=weight.shape, quant_type=quant_type)
        if double_quant:
            state.offset = absmax.mean()
            state.absmax, state.state2 = bnb.quantize_blockwise(absmax - state.offset, blocksize=NESTED_BLOCK_SIZE)
        return cls(packed, state, bias, dtype=dtype)

    def dequantize(self) -> Tensor:
        """Return the weight, [O, I] in ``self.dtype``; bit-identical on every call."""
        return _dequantize_blocks(self.packed, self.quant_state())

    def extra_repr(self) -> str:
        """Return shape, dtype and storage."""
        nested = ", double_quant=True" if self.nested_absmax is not None else ""
        return f"{super().extra_repr()}, quant_type={self.quant_type}{nested}"

    def quant_state(self) -> bnb.QuantState:
        """Return the scales in the library's own form, without its code book."""
        nested = None
        if self.nested_absmax is not None:
            nested = bnb.QuantState(
                absmax=self.nested_absmax, code=self.nested_code, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32
            )
        return bnb.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            blocksize=self.block_size,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=self.offset,
            state2=nested,
        )


def _quantize_blocks(weight: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Return packed codes uint8 [N / 2, 1] and absmax fp32 [N / 64] of a flat weight [N]: those of ``quantize_4bit``.

    Its working memory is several times the weight in fp32; on CPUs, pieces that stay in the caches are also faster.
    """
    size = weight.numel()
    packed = torch.empty((size + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-size // BLOCK_SIZE), dtype=torch.float32, device=weight.device)
    step = _PIECE if weight.device.type == "cpu" else max(size, BLOCK_SIZE)
    for start in range(0, size, step):
        codes, state = bnb.quantize_4bit(
            weight[start : start + step].float(), blocksize=BLOCK_SIZE, quant_type=quant_type
        )
        packed[start // 2 : (start + step) // 2] = codes
        absmax[start // BLOCK_SIZE : (start + step) // BLOCK_SIZE] = state.absmax
    return packed, absmax


def _dequantize_blocks(packed: Tensor, state: bnb.QuantState) -> Tensor:
    """Return the weight in the shape and dtype of ``state``.

    The library's AVX-512 kernel (0.50) reads wrong scales where a row ends in half a block, as in a width of 96. Blocks
    lie in storage order whatever the shape is, so it is given rows of one block, or a single row.
    """
    shape = torch.Size(state.shape or ())
    size = shape.numel()
    block = state.blocksize or BLOCK_SIZE
    state.shape = torch.Size((size // block, block) if size % block == 0 else (1, size))
    return bnb.dequantize_4bit(packed, state).view(shape)


class Int8Base(_PackedBase):
    """``codes / 127 * absmax`` per output row; quantizing it again in fp32 gives bit-equal codes and scales.

    The codes are those of ``bitsandbytes.functional.int8_vectorwise_quant`` (threshold 0), which takes only fp16 on
    GPUs, so the same formula runs here in fp32. Its inverse multiplies by a rounded 1/127, and then the largest weight
    of a row is no longer that row's absmax; dividing the code first keeps it.

    Args:
        codes: int8 [O, I] in [-127, 127].
        absmax: fp32 [O].
        bias: [O] or None.
        dtype: the dtype of ``dequantize()``.
    """

    codes: Tensor
    absmax: Tensor

    def __init__(self, codes: Tensor, absmax: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.dtype = dtype
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> Int8Base:
        """Return ``round(127 W / absmax)`` row by row for ``weight`` [O, I], computed in fp32."""
        weight = weight.detach()
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        absmax = weight.abs().amax(dim=1).float()
        # A row of zeros has no scale of its own; any positive one gives codes of zero.
        scale = _INT8_MAX / absmax.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        for rows in row_blocks(weight):
            codes[rows] = (weight[rows].float() * scale[rows]).round_()
        return cls(codes, absmax, bias, dtype=dtype)

    def dequantize(self) -> Tensor:
        """Return the weight, [O, I] in ``self.dtype``; bit-identical on every call."""
        weight = torch.empty(self.codes.shape, dtype=self.dtype, device=self.codes.device)
        for rows in row_blocks(self.codes):
            weight[rows] = _int8_weight(self.codes[rows], self.absmax[rows])
        return weight


def _int8_weight(codes: Tensor, absmax: Tensor) -> Tensor:
    return codes.float().div_(_INT8_MAX).mul_(absmax.unsqueeze(1))


def dequantize_stored(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the weight, fp32 [O, I], that a checkpoint of bitsandbytes holds in several tensors.

    Args:
        parts: ``weight`` and what the checkpoint stores beside it, by the rest of the name: ``absmax``, ``quant_map``,
            ``quant_state.bitsandbytes__nf4`` or ``__fp4``, ``nested_absmax``, ``nested_quant_map``; for int8 ``SCB``
            and ``weight_format``.

    Raises:
        ValueError: a part is missing, or the int8 codes are in a layout for one kind of GPU.
    """
    parts = dict(parts)
    weight = parts.pop("weight")
    if "SCB" in parts:
        if int(parts.get("weight_format", torch.tensor(_ROW_MAJOR))) != _ROW_MAJOR:
            raise ValueError("int8 codes in a GPU's tile order: load it with transformers and save it again")
        return _int8_weight(weight, parts["SCB"].float())
    if missing := {"absmax", "quant_map"} - parts.keys():
        raise ValueError(f"{', '.join(sorted(missing))} of a 4-bit weight is missing")
    state = bnb.QuantState.from_dict(parts, device=weight.device)
    state.dtype = torch.float32
    return _dequantize_blocks(weight, state)
