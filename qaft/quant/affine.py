"""Affine integer grids of 2 to 8 bits with one scale per group of inputs or per output channel.

    symmetric:   s = max |w| / q_max,                      w^ = s q,        q in [-q_max, q_max],  q_max = 2^(b-1) - 1
    asymmetric:  s = (max(w, 0) - min(w, 0)) / (2^b - 1),  w^ = s (q - z),  q and z in [-2^(b-1), q_max]

Scales are rounded to the dtype in which they are stored before any code is computed, so that the codes are nearest for
the scale that is served. The range follows the weight, so the straight-through gradient is the identity. The error is
at most s / 2, except that an asymmetric extreme also bears the rounding of the scale: s (1/2 + (2^b - 1) e) with
e = 2^-15 for fp32 scales, 2^-10 for fp16 and 2^-7 for bf16 (0.62 s at 4 bits).

fp32 scales keep 16 significant bits: ``s q`` is then exact in fp32 for every code, as it is for 16-bit scales, and
requantizing finds the same scale bit for bit. With 24 bits it does not: ``fl(fl(7 s) / 7) != s`` for some s.

Source: specifications of compressed-tensors (signed codes and zero points); RoSTE (arXiv 2502.09003), equation (6).
Shapes: O = out_features, I = in_features, G = groups along I, N = I / G weights per group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qaft.quant.base import QTensor, Quantizer, row_blocks
from qaft.quant.ste import straight_through

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_DROPPED_BITS = 8
"""Low bits of an fp32 scale that are zero: the product with a code of 8 bits then fits the 24 bits of fp32."""

_DITHER = 0.499
"""Largest dither in steps. The margin to 1/2 covers the fp32 rounding of (q - z + u) s / s, below 255 * 2^-22."""


class Affine(Quantizer):
    """An affine grid: ``q = clamp(round(w / s) + z)`` and ``Q(w) = s (q - z)``, with ties rounded to even ``w / s``.

    Args:
        bits: b, bits per weight, 2 to 8.
        group_size: weights that share a scale along I; None or -1 for one scale per output channel.
        symmetric: no zero point.
        scale_dtype: the dtype in which scales are stored: torch.float32 (16 significant bits), bfloat16 or float16.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        bits: int = 4,
        group_size: int | None = 128,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"bits={bits} must be in [2, 8]")
        if group_size is not None and group_size != -1 and group_size < 1:
            raise ValueError(f"group_size={group_size} must be positive, or null or -1 for a scale per output channel")
        if scale_dtype not in _SCALE_DTYPES:
            raise ValueError(f"scale_dtype={scale_dtype} must be one of {', '.join(map(str, _SCALE_DTYPES))}")
        self.bits = bits
        self.group_size = None if group_size == -1 else group_size
        self.symmetric = symmetric
        self.scale_dtype = scale_dtype
        self.q_max = (1 << (bits - 1)) - 1
        self.q_min = -self.q_max if symmetric else -self.q_max - 1

    def quantize(self, weight: Tensor) -> QTensor:
        """Return codes int8 [O, I], scales [O, G] in ``scale_dtype`` and, unless symmetric, zero points int8 [O, G].

        A group of zeros gets the smallest normal scale and represents zeros.

        Raises:
            ValueError: I is not divisible by the group size, the weight has a value that is not finite, or a scale
                exceeds the range of ``scale_dtype``.
        """
        weight = weight.detach()
        num_groups = self._num_groups(weight)
        values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(weight.shape[0], num_groups, dtype=self.scale_dtype, device=weight.device)
        zero_point = torch.empty(scale.shape, dtype=torch.int8, device=weight.device)
        for rows in row_blocks(weight):
            levels, scale[rows], lowest = self._levels(weight[rows], num_groups)
            offset = self.q_min - lowest
            zero_point[rows] = offset
            values[rows] = levels.add_(offset.unsqueeze(-1)).flatten(1)
        self._check_finite(weight, scale)
        return QTensor(values, scale, None if self.symmetric else zero_point)

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``quantize(weight).dequantize(torch.float32)``, [O, I], with the gradient of the identity.

        A value that is not finite makes its group NaN instead of raising: a check would stall the device in every step,
        and a NaN reaches the loss, which the training loop checks.
        """
        return straight_through(weight, self._quantized_values(weight), None)

    def dither(self, quantized: QTensor, generator: torch.Generator) -> Tensor:
        """Return fp32 latents ``s (q - z + u)``, u uniform in (-1/2, 1/2), that quantize exactly to ``quantized``.

        The range follows the weight, so the levels that span it may only move inwards, and in each group one weight
        that carries each extreme stays exact. Result: [O, I].

        Args:
            quantized: what ``quantize`` of this grid returned.
            generator: source of u; its device need not be that of ``quantized``.

        Raises:
            ValueError: no latents of this grid have these codes and scales (they come from another grid, or from one
                whose scales were clipped).
        """
        uniform = torch.rand(quantized.values.shape, generator=generator, device=generator.device)
        latents = ((2 * uniform - 1) * _DITHER).to(quantized.values.device)
        for rows in row_blocks(latents):
            zero_point = None if quantized.zero_point is None else quantized.zero_point[rows]
            self._dither_rows(latents[rows], QTensor(quantized.values[rows], quantized.scale[rows], zero_point))
        if not self.quantize(latents).equals(quantized):
            raise ValueError(
                f"these codes and scales are no result of Affine({self.extra_repr()}), so no latent weight quantizes "
                "to them: dequantize them, and quantize with this grid first"
            )
        return latents

    def _dither_rows(self, latents: Tensor, quantized: QTensor) -> None:
        """Replace the dither u in ``latents`` [O, I] by ``s (q - z + u)``, with u restricted at the extremes."""
        scale = quantized.scale.float().unsqueeze(-1)
        dither = latents.unflatten(-1, (scale.shape[1], -1))
        levels = quantized.values.float().view_as(dither)
        low, high = torch.full_like(scale, self.q_min), torch.full_like(scale, self.q_max)
        if quantized.zero_point is not None:
            zero_point = quantized.zero_point.float().unsqueeze(-1)
            levels, low, high = levels - zero_point, low - zero_point, high - zero_point
        at_low, at_high = levels == low, levels == high
        dither.copy_(torch.where(at_low, dither.abs(), torch.where(at_high, -dither.abs(), dither)))
        for extreme in (at_low | at_high,) if self.symmetric else (at_low, at_high):
            dither.masked_fill_(extreme & (extreme.cumsum(-1) == 1), 0.0)
        dither.add_(levels).mul_(scale)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        grid = f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}"
        return f"{grid}, scale_dtype={self.scale_dtype}"

    @torch.no_grad()
    def _quantized_values(self, weight: Tensor) -> Tensor:
        # The same levels and the same product as quantize().dequantize(), without the trip through int8.
        num_groups = self._num_groups(weight)
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        for rows in row_blocks(weight):
            levels, scale, _ = self._levels(weight[rows], num_groups, out=out[rows])
            levels.mul_(scale.unsqueeze(-1))
        return out

    def _levels(self, weight: Tensor, num_groups: int, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``round(w / s)`` within the range [O, G, N], s and the lowest level ``q_min - z`` (fp32 [O, G])."""
        groups = weight.float().unflatten(-1, (num_groups, -1))
        levels = torch.empty_like(groups) if out is None else out.unflatten(-1, (num_groups, -1))
        if self.symmetric:
            scale = self._round_scale(torch.abs(groups, out=levels).amax(-1) / self.q_max)
            lowest = torch.full_like(scale, self.q_min)
        else:
            scale, lowest = self._fit_range(groups)
        torch.div(groups, scale.unsqueeze(-1), out=levels).round_()
        if not self.symmetric:
            # Not for symmetric grids: rounding moves their scale by at most 2^-8 (bf16), and 127 (1 + 2^-8) < 127.5.
            highest = lowest + (self.q_max - self.q_min)
            torch.clamp(levels, lowest.unsqueeze(-1), highest.unsqueeze(-1), out=levels)
        return levels, scale, lowest

    def _fit_range(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the lowest level of asymmetric ``groups`` [O, G, N], both fp32 [O, G].

        The codes of a group reach both ends of the range, without which requantizing would shrink the scale. A scale
        that was rounded up, or two ties, can leave the last code unused; the next smaller scale does not.
        """
        low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
        span = self.q_max - self.q_min
        scale = self._round_scale((high - low) / span)
        unused = (high / scale).round_() - (low / scale).round_() < span
        unused &= (scale > torch.finfo(self.scale_dtype).tiny) & scale.isfinite()
        scale = torch.where(unused, self._next_smaller(scale), scale)
        return scale, (low / scale).round_().clamp_(min=-span)

    def _round_scale(self, scale: Tensor) -> Tensor:
        """Return ``scale`` (fp32) rounded to what ``scale_dtype`` stores, at least its smallest normal number."""
        scale = scale.clamp(min=torch.finfo(self.scale_dtype).tiny)
        if self.scale_dtype != torch.float32:
            return scale.to(self.scale_dtype).float()
        # Truncated, not rounded to nearest: adding half a unit to the bits of a NaN could wrap them into a number.
        return (scale.view(torch.int32) & -(1 << _DROPPED_BITS)).view(torch.float32)

    def _next_smaller(self, scale: Tensor) -> Tensor:
        """Return the next storable number below each ``scale``, which is fp32, positive and storable."""
        if self.scale_dtype == torch.float32:
            return (scale.view(torch.int32) - (1 << _DROPPED_BITS)).view(torch.float32)
        return (scale.to(self.scale_dtype).view(torch.int16) - 1).view(self.scale_dtype).float()

    def _num_groups(self, weight: Tensor) -> int:
        in_features = weight.shape[-1]
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            fitting = [str(size) for size in range(8, min(in_features, 1024) + 1) if in_features % size == 0]
            raise ValueError(
                f"in_features={in_features} is not divisible by group_size={self.group_size}: use "
                f"{', '.join(fitting)}{' or ' if fitting else ''}null (one scale per output channel)"
            )
        return in_features // self.group_size

    def _check_finite(self, weight: Tensor, scale: Tensor) -> None:
        if torch.isfinite(scale).all():
            return
        if not torch.isfinite(weight).all():
            raise ValueError(f"the weight {list(weight.shape)} has values that are not finite: it cannot be quantized")
        raise ValueError(
            f"a scale exceeds the largest {self.scale_dtype}, {torch.finfo(self.scale_dtype).max:g}: "
            "store scales in torch.bfloat16 or torch.float32"
        )
