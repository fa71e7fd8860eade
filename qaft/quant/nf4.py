"""NF4, the 4-bit code book of QLoRA, bit-equal to what bitsandbytes stores without double quantization.

    a = max |w| over a block of N inputs,  code = the nearest level to w / a,  w^ = level[code] a

The levels are quantiles of a normal distribution scaled to [-1, 1]; 0, -1 and 1 are among them, so the block maximum is
exact and nothing is clipped: the straight-through gradient is the identity.

Source: QLoRA (arXiv 2305.14314), appendix E, for the levels; bitsandbytes 0.50, ``backends/default/ops.py``.
Shapes: O = out_features, I = in_features, G = blocks along I, N = I / G.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qaft.quant.base import QTensor, Quantizer, row_blocks, width_of
from qaft.quant.ste import straight_through

_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The block sizes that bitsandbytes can read."""

_SMALLEST_ABSMAX = 1e-38
"""bitsandbytes divides by at least this, so that a block of zeros has the code of zero."""

_MARGIN = 1e-3
"""Part of a decision cell that dither leaves out at each end: far more than the fp32 rounding of w / a, 2^-22."""


@cache
def _codebook(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the 16 levels and the 15 decision boundaries between them, fp32 on ``device``."""
    levels = torch.tensor(_LEVELS, device=device)
    return levels, (levels[:-1] + levels[1:]) / 2


def _num_below(x: Tensor, bounds: Tensor) -> Tensor:
    """Return for each element of ``x`` how many ``bounds`` are smaller, int64: what ``torch.bucketize`` returns."""
    if x.device.type != "cpu":
        return torch.bucketize(x, bounds)
    # On a CPU 15 vectorized comparisons take a sixth of the time of bucketize's scalar binary search; the result of a
    # comparison is vectorized only when it is written as a float.
    count, above = torch.zeros_like(x), torch.empty_like(x)
    for bound in bounds.tolist():
        count.add_(torch.gt(x, bound, out=above))
    return count.long()


class NF4(Quantizer):
    """The NF4 grid with one fp32 scale per block; blocks never cross rows, so rows quantize independently.

    Args:
        group_size: weights per block, one of the sizes of bitsandbytes.

    Raises:
        ValueError: bitsandbytes has no such block size.
    """

    def __init__(self, *, group_size: int = 64) -> None:
        super().__init__()
        if group_size not in _BLOCK_SIZES:
            raise ValueError(f"group_size={group_size} must be one of {', '.join(map(str, _BLOCK_SIZES))} for nf4")
        self.bits = 4
        self.group_size = group_size
        # There is no zero point: level 7 is exactly zero.
        self.symmetric = True

    def quantize(self, weight: Tensor) -> QTensor:
        """Return level indices int8 [O, I], absolute maxima fp32 [O, G] and the code book fp32 [16].

        Raises:
            ValueError: I is not divisible by the group size, or the weight has a value that is not finite.
        """
        weight = weight.detach()
        num_groups = self._num_groups(weight)
        values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(weight.shape[0], num_groups, dtype=torch.float32, device=weight.device)
        for rows in row_blocks(weight):
            values[rows], scale[rows] = self._indices(weight[rows], num_groups)
        if not torch.isfinite(scale).all():
            raise ValueError(f"the weight {list(weight.shape)} has values that are not finite: it cannot be quantized")
        return QTensor(values, scale, codebook=_codebook(weight.device)[0])

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``quantize(weight).dequantize(torch.float32)``, [O, I], with the gradient of the identity.

        A value that is not finite makes its block NaN instead of raising: a check would stall the device in every step,
        and a NaN reaches the loss, which the training loop checks.
        """
        return straight_through(weight, self._quantized_values(weight), None)

    def dither(self, quantized: QTensor, generator: torch.Generator) -> Tensor:
        """Return fp32 latents, uniform in the decision cell of each code, that quantize exactly to ``quantized``.

        The outermost cells end at -1 and 1, and in each block one weight of level -1 or 1 stays exact: it sets the
        scale. Result: [O, I].

        Args:
            quantized: what ``quantize`` of this grid returned.
            generator: source of randomness; its device need not be that of ``quantized``.

        Raises:
            ValueError: no latents have these codes and scales (a block without level -1 or 1, or a foreign code book).
        """
        levels, bounds = _codebook(quantized.values.device)
        edges = torch.cat([levels[:1], bounds, levels[-1:]])
        widths = edges[1:] - edges[:-1]
        uniform = torch.rand(quantized.values.shape, generator=generator, device=generator.device)
        latents = uniform.to(levels.device).mul_(1 - 2 * _MARGIN).add_(_MARGIN)
        for rows in row_blocks(latents):
            indices = quantized.values[rows].int()
            latents[rows] = edges[indices] + latents[rows] * widths[indices]
            blocks = latents[rows].unflatten(-1, (quantized.scale.shape[-1], -1))
            extreme = ((indices == 0) | (indices == len(levels) - 1)).view_as(blocks)
            exact = extreme & (extreme.cumsum(-1) == 1)
            blocks.copy_(torch.where(exact, levels[indices].view_as(blocks), blocks))
            blocks.mul_(quantized.scale[rows].float().unsqueeze(-1))
        return self._checked_dither(latents, quantized)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"group_size={self.group_size}"

    @torch.no_grad()
    def _quantized_values(self, weight: Tensor) -> Tensor:
        num_groups = self._num_groups(weight)
        levels, _ = _codebook(weight.device)
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        for rows in row_blocks(weight):
            indices, scale = self._indices(weight[rows], num_groups)
            torch.gather(levels.expand(indices.shape[0], -1), 1, indices, out=out[rows])
            out[rows].unflatten(-1, (num_groups, -1)).mul_(scale.unsqueeze(-1))
        return out

    def _indices(self, weight: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
        """Return the level indices int64 [O, I] and the absolute maxima fp32 [O, G] of ``weight`` [O, I]."""
        _, bounds = _codebook(weight.device)
        blocks = weight.float().unflatten(-1, (num_groups, -1))
        scale = blocks.abs().amax(-1)
        # bitsandbytes multiplies by the reciprocal; a quotient would give other codes next to a boundary.
        scaled = blocks * (1.0 / scale.clamp(min=_SMALLEST_ABSMAX)).unsqueeze(-1)
        return _num_below(scaled, bounds).flatten(-2), scale

    def _num_groups(self, weight: Tensor) -> int:
        in_features = width_of(weight)
        if self.group_size is None or in_features % self.group_size:
            fitting = [str(size) for size in _BLOCK_SIZES if in_features % size == 0]
            raise ValueError(
                f"in_features={in_features} is not divisible by group_size={self.group_size}: "
                + (f"use {', '.join(fitting)}" if fitting else "no nf4 block size fits, use an int grid for this layer")
            )
        return in_features // self.group_size
