"""Affine integer grids of 2 to 8 bits with one scale per group of inputs or per output channel.

    symmetric:   w^ = s q,        q in [-q_max, q_max] or [-q_max - 1, q_max],  q_max = 2^(b-1) - 1
    asymmetric:  w^ = s (q - z),  q and z in [-q_max - 1, q_max]

``ranges.py`` says how s and z follow from the weights. Scales are rounded to the dtype in which they are stored before
any code is computed, so that the codes are nearest for the scale that is served. The default range, absmax, contains
the weights, so the straight-through gradient is the identity and the error is at most s / 2, except that an asymmetric
extreme also bears the rounding of the scale: s (1/2 + (2^b - 1) e) with e = 2^-15 for fp32 scales, 2^-10 for fp16 and
2^-7 for bf16 (0.62 s at 4 bits). Other ranges clip; where their gradient passes is chosen by ``ste``.

Source: specifications of compressed-tensors (signed codes and zero points); RoSTE (arXiv 2502.09003), equation (6).
Shapes: O = out_features, I = in_features, G = groups along I, N = I / G weights per group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qaft.native.gpu import on_triton
from qaft.quant.base import QTensor, Quantizer, row_blocks, width_of
from qaft.quant.fused import check_fused, fused_quantize
from qaft.quant.masks import check_mask, wants_mask
from qaft.quant.ranges import Range
from qaft.quant.scales import ScaleStorage, quotient
from qaft.quant.ste import straight_through

_DITHER = 0.499
"""Largest dither in steps. The margin to 1/2 covers the fp32 rounding of (q - z + u) s / s, below 255 * 2^-22."""


class Affine(Quantizer):
    """An affine grid: ``q = clamp(round(w / s) + z)`` and ``Q(w) = s (q - z)``, with ties rounded to even ``w / s``.

    Args:
        bits: b, bits per weight, 2 to 8.
        group_size: weights that share a scale along I; None or -1 for one scale per output channel.
        symmetric: no zero point.
        range: how a group's scale follows from its weights: absmax, mse, rms or signed_absmax.
        clip: the part of the range that is kept, in (0, 1]; absmax only.
        ste: where the gradient passes: identity, clamp or trust.
        fused: compile the forward pass on CPUs; absmax and signed_absmax only. The codes are the same.
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
        range: str = "absmax",
        clip: float = 1.0,
        ste: str = "clamp",
        fused: bool = False,
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"bits={bits} must be in [2, 8]")
        if group_size is not None and group_size != -1 and group_size < 1:
            raise ValueError(f"group_size={group_size} must be positive, or null or -1 for a scale per output channel")
        self.bits = bits
        self.group_size = None if group_size == -1 else group_size
        self.symmetric = symmetric
        self.ste = check_mask(ste)
        self.scale_dtype = scale_dtype
        storage = ScaleStorage(scale_dtype)
        self.range = Range(kind=range, clip=clip, bits=bits, symmetric=symmetric, storage=storage)
        self.q_min, self.q_max = self.range.q_min, self.range.q_max
        if fused:
            check_fused(self.range)
        self.fused = fused

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
            levels, scale[rows], lowest, _ = self._levels(weight[rows], num_groups)
            offset = self.q_min - lowest
            zero_point[rows] = offset
            values[rows] = levels.add_(offset.unsqueeze(-1)).flatten(1)
        self._check_finite(weight, scale)
        return QTensor(values, scale, None if self.symmetric else zero_point)

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``quantize(weight).dequantize(torch.float32)``, [O, I], with the straight-through gradient.

        A value that is not finite makes its group NaN instead of raising: a check would stall the device in every step,
        and a NaN reaches the loss, which the training loop checks.
        """
        masked = not self.range.follows_extremes and wants_mask(weight, self.ste)
        return straight_through(weight, *self._quantized_values(weight, masked=masked))

    def dither(self, quantized: QTensor, generator: torch.Generator) -> Tensor:
        """Return fp32 latents ``s (q - z + u)``, u uniform in (-1/2, 1/2), that quantize exactly to ``quantized``.

        The range follows the weight, so the levels that span it may only move inwards, and in each group one weight
        that carries each extreme stays exact. Result: [O, I].

        Args:
            quantized: what ``quantize`` of this grid returned.
            generator: source of u; its device need not be that of ``quantized``.

        Raises:
            ValueError: no latents of this grid have these codes and scales (they come from another grid, or from one
                whose scales were clipped), or the range of this grid depends on more than the extremes.
        """
        if not self.can_dither:
            raise ValueError(
                f"latents of Affine({self.extra_repr()}) cannot be dithered: their scales would be fitted anew; use "
                "range absmax or signed_absmax without a clip"
            )
        uniform = torch.rand(quantized.values.shape, generator=generator, device=generator.device)
        latents = ((2 * uniform - 1) * _DITHER).to(quantized.values.device)
        for rows in row_blocks(latents):
            zero_point = None if quantized.zero_point is None else quantized.zero_point[rows]
            self._dither_rows(latents[rows], QTensor(quantized.values[rows], quantized.scale[rows], zero_point))
        return self._checked_dither(latents, quantized)

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
        anchors = (at_low, at_high)
        if self.symmetric:
            # A signed range is set by its lowest level alone, an unsigned one by whichever end is reached.
            anchors = (at_low,) if self.range.kind == "signed_absmax" else (at_low | at_high,)
        for extreme in anchors:
            dither.masked_fill_(extreme & (extreme.cumsum(-1) == 1), 0.0)
        dither.add_(levels).mul_(scale)

    @property
    def can_dither(self) -> bool:
        """Whether scales follow from the extremes alone."""
        return not self.range.refits

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        grid = f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}"
        how = f"range={self.range.kind!r}, clip={self.range.clip}, ste={self.ste!r}"
        return f"{grid}, {how}, scale_dtype={self.scale_dtype}"

    @torch.no_grad()
    def _quantized_values(self, weight: Tensor, *, masked: bool) -> tuple[Tensor, Tensor | None]:
        # The same levels and the same product as quantize().dequantize(), without the trip through int8.
        num_groups = self._num_groups(weight)
        fused = self._one_pass(weight, num_groups)
        if fused is not None:
            groups = weight.detach().reshape(weight.shape[0], num_groups, -1)
            values, passes = fused(groups, self.range, ste=self.ste, masked=masked)
            return values.view(weight.shape), None if passes is None else passes.view(weight.shape)
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device) if masked else None
        for rows in row_blocks(weight):
            levels, scale, _, passes = self._levels(weight[rows], num_groups, out=out[rows], masked=masked)
            torch.mul(levels, scale.unsqueeze(-1), out=out[rows].view(levels.shape))
            if mask is not None and passes is not None:
                mask[rows] = passes.flatten(1)
        return out, mask

    def _one_pass(self, weight: Tensor, num_groups: int) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
        """Return what quantizes ``weight`` with one read and one write, or None."""
        if weight.numel() and self.fused and weight.device.type == "cpu":
            return fused_quantize
        if weight.numel() and on_triton(weight):
            from qaft.quant.triton_affine import fake_quantize, supports

            return fake_quantize if supports(self.range, weight.shape[1] // num_groups) else None
        return None

    def _levels(
        self, weight: Tensor, num_groups: int, *, out: Tensor | None = None, masked: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return ``round(w / s)`` within the range [O, G, N], s and the lowest level ``q_min - z`` (fp32 [O, G]).

        Last, with ``masked``: where the gradient passes, bool [O, G, N].
        """
        groups = weight.float().unflatten(-1, (num_groups, -1))
        if self.symmetric and self.range.follows_extremes:
            levels = torch.empty_like(groups) if out is None else out.unflatten(-1, (num_groups, -1))
            scale = self.range.storage.round(quotient(torch.abs(groups, out=levels).amax(-1), self.q_max))
            torch.div(groups, scale.unsqueeze(-1), out=levels).round_()
            # Not clamped: rounding moves the scale by at most 2^-8 (bf16), and 127 (1 + 2^-8) < 127.5.
            return levels, scale, torch.full_like(scale, self.q_min), None
        return self.range.levels(groups, ste=self.ste, masked=masked)

    def _num_groups(self, weight: Tensor) -> int:
        in_features = width_of(weight)
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
