"""MXFP4 and NVFP4: 4-bit floats (e2m1) that share a small float per block of inputs.

    levels   0, 1/2, 1, 3/2, 2, 3, 4, 6 and their negatives; a code is the bit pattern of the float, sign first
    MXFP4    blocks of 32, s = 2^e (e8m0): e puts max |w| / s into [3.5, 7), whose values round to 4 or 6
    NVFP4    blocks of 16, s = t r: r = e4m3(max |w| / (6 t)) per block, t one power of two per tensor

    w^ = s level(code), ties to the even mantissa; |w / s| up to 7 (MXFP4) or 6.4 (NVFP4) is clipped to 6

NVFP4 lets t be any fp32 number. A power of two is free (r has 15 binades) and makes ``t r level`` exact, so that every
reader, whether it multiplies by t or divides by 1 / t, sees the same weight, and requantizing finds it again. t puts
the largest r of the tensor into [240, 448], the top of e4m3.

Source: OCP Microscaling Formats 1.0, with the rounding of e8m0 scales of compressed-tensors 0.20 (``mxfp_utils.py``);
NVIDIA, "Introducing NVFP4 for efficient and accurate low-precision inference".
Shapes: O = out_features, I = in_features, G = blocks along I, N = I / G.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cache

import torch
from torch import Tensor

from qaft.quant.base import QTensor, Quantizer, row_blocks, width_of
from qaft.quant.masks import check_mask, inside, wants_mask
from qaft.quant.ste import straight_through

_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_CELLS = (0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Where the decision cell of each level begins."""

_HALF_STEP = 1.0
"""Half of the widest step, from 4 to 6."""

_MARGIN = 1e-3
"""Part of a decision cell that dither leaves out at each end: far more than the fp32 rounding of w / s, 2^-23."""

_TINY_E4M3 = 2.0**-9

_SMALLEST_EXPONENT = -116


@cache
def _codebook(device: torch.device) -> Tensor:
    """Return the 16 levels in the order of their bit patterns, fp32 on ``device``."""
    positive = torch.tensor(_LEVELS, device=device)
    return torch.cat([positive, -positive])


def round_e2m1(scaled: Tensor) -> Tensor:
    """Return the e2m1 number nearest to each value of ``scaled``, ties to the even mantissa, fp32 of the same shape."""
    size = scaled.abs()
    fine, coarse = (size * 2).round_() / 2, (size / 2).round_() * 2
    level = torch.where(size < 2, fine, torch.where(size < 4, size.round(), coarse)).clamp_(max=_LEVELS[-1])
    return level.copysign_(scaled)


def _codes(levels: Tensor) -> Tensor:
    """Return the bit patterns (int8, 0 to 15) of e2m1 numbers; a negative zero has the code of zero."""
    size = levels.abs()
    # 0..2 in halves are codes 0..4; 3, 4 and 6 are 5, 6 and 7.
    code = torch.where(size <= 2, size * 2, torch.where(size < 4, size + 2, size / 2 + 4))
    return (code + 8 * (levels < 0)).to(torch.int8)


class _E2M1(Quantizer):
    """What MXFP4 and NVFP4 share: everything but the scale of a block."""

    def __init__(self, *, group_size: int, ste: str) -> None:
        super().__init__()
        self.bits = 4
        self.group_size: int = group_size
        # There is no zero point: code 0 is exactly zero.
        self.symmetric = True
        self.ste = check_mask(ste)

    def quantize(self, weight: Tensor) -> QTensor:
        """Return bit patterns int8 [O, I], block scales [O, G] in the format's dtype, and the code book fp32 [16].

        A block of zeros represents zeros.

        Raises:
            ValueError: I is not divisible by the block size, or the weight has a value that is not finite.
        """
        weight = weight.detach()
        num_groups = self._num_groups(weight)
        tensor_scale = self._tensor_scale(weight)
        values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(weight.shape[0], num_groups, dtype=torch.float32, device=weight.device)
        for rows in row_blocks(weight):
            blocks, scale[rows] = self._fit(weight[rows], num_groups, tensor_scale)
            effective = scale[rows] if tensor_scale is None else scale[rows] * tensor_scale
            values[rows] = _codes(round_e2m1(blocks / effective.unsqueeze(-1))).flatten(1)
        if not torch.isfinite(scale).all():
            raise ValueError(f"the weight {list(weight.shape)} has values that are not finite: it cannot be quantized")
        return QTensor(
            values, scale.to(self._scale_dtype()), codebook=_codebook(weight.device), tensor_scale=tensor_scale
        )

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``quantize(weight).dequantize(torch.float32)``, [O, I], with the straight-through gradient.

        A value that is not finite makes its block NaN instead of raising: a check would stall the device in every step,
        and a NaN reaches the loss, which the training loop checks.
        """
        return straight_through(weight, *self._quantized_values(weight, masked=wants_mask(weight, self.ste)))

    def dither(self, quantized: QTensor, generator: torch.Generator) -> Tensor:
        """Return fp32 latents, uniform in the decision cell of each code, that quantize exactly to ``quantized``.

        Result: [O, I].

        Args:
            quantized: what ``quantize`` of this grid returned.
            generator: source of randomness; its device need not be that of ``quantized``.

        Raises:
            ValueError: no latents have these codes and scales (they come from another grid).
        """
        device = quantized.values.device
        edges = torch.tensor((*_CELLS, self._reach()), device=device)
        uniform = torch.rand(quantized.values.shape, generator=generator, device=generator.device)
        latents = uniform.to(device).mul_(1 - 2 * _MARGIN).add_(_MARGIN)
        scale = quantized.scale.float()
        if quantized.tensor_scale is not None:
            scale = scale * quantized.tensor_scale
        for rows in row_blocks(latents):
            level = quantized.values[rows].int()
            size = level & 7
            dithered = edges[size] + latents[rows] * (edges[size + 1] - edges[size])
            # The cell of zero has two sides; which one is as random as the place within it.
            negative = torch.where(size == 0, latents[rows] < 0.5, level >= 8)
            dithered = torch.where(negative, -dithered, dithered).unflatten(-1, (scale.shape[-1], -1))
            dithered = self._anchor(dithered, level.view_as(dithered))
            latents[rows] = (dithered * scale[rows].unsqueeze(-1)).flatten(1)
        return self._checked_dither(latents, quantized)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"ste={self.ste!r}"

    @abstractmethod
    def _tensor_scale(self, weight: Tensor) -> Tensor | None:
        """Return t, fp32 [], or None for a format without."""

    @abstractmethod
    def _block_scale(self, absmax: Tensor, tensor_scale: Tensor | None) -> Tensor:
        """Return the scale of blocks with maxima ``absmax`` (fp32 [O, G]), fp32, exactly as it is stored."""

    @abstractmethod
    def _scale_dtype(self) -> torch.dtype:
        """Return the dtype in which scales are stored."""

    @abstractmethod
    def _reach(self) -> float:
        """Return the largest |w / s| of a weight, where the cell of the top level ends."""

    def _anchor(self, dithered: Tensor, codes: Tensor) -> Tensor:
        """Return ``dithered`` [O, G, N] with what determines the scale put where ``codes`` have it."""
        return dithered

    @torch.no_grad()
    def _quantized_values(self, weight: Tensor, *, masked: bool) -> tuple[Tensor, Tensor | None]:
        num_groups = self._num_groups(weight)
        tensor_scale = self._tensor_scale(weight)
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device) if masked else None
        for rows in row_blocks(weight):
            blocks, scale = self._fit(weight[rows], num_groups, tensor_scale)
            effective = (scale if tensor_scale is None else scale * tensor_scale).unsqueeze(-1)
            scaled = blocks / effective
            out[rows] = (round_e2m1(scaled) * effective).flatten(1)
            if mask is not None:
                top = _LEVELS[-1]
                mask[rows] = inside(scaled, -top, top, ste=self.ste, half_step=_HALF_STEP).flatten(1)
        return out, mask

    def _fit(self, weight: Tensor, num_groups: int, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the blocks of ``weight``, fp32 [O, G, N], and their stored scales, fp32 [O, G]."""
        blocks = weight.float().unflatten(-1, (num_groups, -1))
        absmax = blocks.abs().amax(-1)
        scale = self._block_scale(absmax, tensor_scale)
        return blocks, torch.where(absmax.isfinite(), scale, torch.nan)

    def _num_groups(self, weight: Tensor) -> int:
        in_features = width_of(weight)
        if in_features % self.group_size:
            raise ValueError(
                f"in_features={in_features} is not divisible by {self.group_size}, the block size of "
                f"{type(self).__name__}: use an int grid for this layer"
            )
        return in_features // self.group_size


class MXFP4(_E2M1):
    """The MXFP4 grid of the OCP Microscaling formats: blocks of 32 inputs, scales that are powers of two.

    Args:
        ste: where the gradient passes: identity, clamp or trust.

    Raises:
        ValueError: there is no such mask.
    """

    def __init__(self, *, ste: str = "clamp") -> None:
        super().__init__(group_size=32, ste=ste)

    def _tensor_scale(self, weight: Tensor) -> None:
        return None

    def _block_scale(self, absmax: Tensor, tensor_scale: Tensor | None) -> Tensor:
        # Adding a quarter to a mantissa of at least 1.75 carries into the exponent; the mask then drops the mantissa.
        exponent = ((absmax.view(torch.int32) + (1 << 21)) >> 23) - 2
        # From 2^-126: a smaller scale would be subnormal in fp32, where devices flush it to zero.
        return (exponent.clamp_(min=1) << 23).view(torch.float32)

    def _scale_dtype(self) -> torch.dtype:
        return torch.float8_e8m0fnu

    def _reach(self) -> float:
        return 7.0


class NVFP4(_E2M1):
    """The NVFP4 grid of NVIDIA's Blackwell: blocks of 16 inputs with e4m3 scales, and one scale per tensor.

    Args:
        ste: where the gradient passes: identity, clamp or trust.

    Raises:
        ValueError: there is no such mask.
    """

    def __init__(self, *, ste: str = "clamp") -> None:
        super().__init__(group_size=16, ste=ste)

    def _tensor_scale(self, weight: Tensor) -> Tensor:
        absmax = torch.zeros((), device=weight.device)
        for rows in row_blocks(weight):
            absmax = torch.maximum(absmax, weight[rows].detach().float().abs().amax())
        # 464 lies between 448, the largest e4m3 number, and its successor 480: r becomes 240 to 448, and the maximum
        # of a requantized tensor, 6 r t, lies in the same interval and gives the same t.
        mantissa, exponent = torch.frexp(absmax / (464.0 * _LEVELS[-1]))
        # A ratio of exactly 232 would round to 224, and the requantized tensor would then have half of t.
        exponent = exponent - (mantissa == 0.5).int()
        # 2^-9 t, the smallest scale of a block, stays normal in fp32; frexp calls the exponent of zero 0.
        exponent = torch.where(absmax == 0, _SMALLEST_EXPONENT, exponent.clamp(min=_SMALLEST_EXPONENT))
        return torch.ldexp(torch.ones_like(absmax), exponent)

    def _block_scale(self, absmax: Tensor, tensor_scale: Tensor | None) -> Tensor:
        assert tensor_scale is not None
        ratio = absmax / (_LEVELS[-1] * tensor_scale)
        return ratio.clamp(min=_TINY_E4M3, max=448.0).to(torch.float8_e4m3fn).float()

    def _scale_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def _reach(self) -> float:
        return _LEVELS[-1]

    def _anchor(self, dithered: Tensor, codes: Tensor) -> Tensor:
        top = (codes & 7) == len(_LEVELS) - 1
        exact = _codebook(codes.device)[codes]
        return torch.where(top & (top.cumsum(-1) == 1), exact, dithered)
