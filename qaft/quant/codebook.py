"""The code books of bitsandbytes as grids: 16 levels and one fp32 scale per block of inputs.

    a = max |w| over a block of N inputs,  code = the nearest level to w / a,  w^ = level[code] a

The levels lie in [-1, 1] and hold -1, 0 and 1, so the block maximum is exact and nothing is clipped: the
straight-through gradient is the identity. Of two levels at the same distance the lower one is chosen. Codes and scales
are bit-equal to what bitsandbytes stores on a CPU without double quantization.

Codes name levels in the order of the book, which need not be that of their sizes. Two codes may name one level (FP4 has
two zeros); they are neighbours, and the boundary between their cells is the level itself.

Source: bitsandbytes 0.50, ``backends/default/ops.py``.
Shapes: O = out_features, I = in_features, G = blocks along I, N = I / G.
"""

from __future__ import annotations

from abc import ABC
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from qaft.quant.base import QTensor, Quantizer, row_blocks, width_of
from qaft.quant.ste import straight_through

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The block sizes that bitsandbytes can read."""

_SMALLEST_ABSMAX = 1e-38
"""bitsandbytes divides by at least this, so that a block of zeros has the code of zero."""

_MARGIN = 1e-3
"""Part of a decision cell that dither leaves out at each end: far more than the fp32 rounding of w / a, 2^-22."""


class Tables(NamedTuple):
    """The levels of a code book by rank, from the lowest, and what codes they have.

    Attributes:
        levels: fp32 [K], ascending.
        bounds: fp32 [K - 1], the decision boundaries between them.
        codes: int8 [K], rank -> code, or None where codes are ranks.
        ranks: int64 [K], code -> rank.
        codebook: fp32 [K], code -> level.
    """

    levels: Tensor
    bounds: Tensor
    codes: Tensor | None
    ranks: Tensor
    codebook: Tensor


@cache
def tables(levels: tuple[float, ...], device: torch.device) -> Tables:
    """Return the tables of ``levels``, which are in the order of their codes, on ``device``."""
    codebook = torch.tensor(levels, device=device)
    # Of two codes of one level the lower one comes first, as bitsandbytes sorts them on CPUs.
    ascending, codes = codebook.sort(stable=True)
    ranks = codes.argsort()
    bounds = (ascending[:-1] + ascending[1:]) / 2
    is_sorted = bool((codes.diff() > 0).all())
    return Tables(ascending, bounds, None if is_sorted else codes.to(torch.int8), ranks, codebook)


def num_below(x: Tensor, bounds: Tensor) -> Tensor:
    """Return for each element of ``x`` how many ``bounds`` are smaller, int64: what ``torch.bucketize`` returns."""
    if x.device.type != "cpu":
        return torch.bucketize(x, bounds)
    # On a CPU 15 vectorized comparisons take a sixth of the time of bucketize's scalar binary search; the result of a
    # comparison is vectorized only when it is written as a float.
    count, above = torch.zeros_like(x), torch.empty_like(x)
    for bound in bounds.tolist():
        count.add_(torch.gt(x, bound, out=above))
    return count.long()


class CodeBook(Quantizer, ABC):
    """A code book with one fp32 scale per block; blocks never cross rows, so rows quantize independently.

    Args:
        group_size: weights per block, one of the sizes of bitsandbytes.

    Attributes:
        kind: the name of the code book in bitsandbytes and in recipes.
        levels: the level of each code.

    Raises:
        ValueError: bitsandbytes has no such block size.
    """

    kind: ClassVar[str]
    levels: ClassVar[tuple[float, ...]]

    def __init__(self, *, group_size: int = 64) -> None:
        super().__init__()
        if group_size not in _BLOCK_SIZES:
            raise ValueError(
                f"group_size={group_size} must be one of {', '.join(map(str, _BLOCK_SIZES))} for {self.kind}"
            )
        self.bits = 4
        self.group_size = group_size
        # There is no zero point: a level is exactly zero.
        self.symmetric = True

    def quantize(self, weight: Tensor) -> QTensor:
        """Return codes int8 [O, I], absolute maxima fp32 [O, G] and the code book fp32 [16].

        Raises:
            ValueError: I is not divisible by the group size, or the weight has a value that is not finite.
        """
        weight = weight.detach()
        num_groups = self._num_groups(weight)
        values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(weight.shape[0], num_groups, dtype=torch.float32, device=weight.device)
        book = self._tables(weight.device)
        for rows in row_blocks(weight):
            ranks, scale[rows] = self._ranks(weight[rows], num_groups)
            values[rows] = ranks if book.codes is None else book.codes[ranks]
        if not torch.isfinite(scale).all():
            raise ValueError(f"the weight {list(weight.shape)} has values that are not finite: it cannot be quantized")
        return QTensor(values, scale, codebook=book.codebook)

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
        levels, bounds, codes, ranks, _ = self._tables(quantized.values.device)
        edges = torch.cat([levels[:1], bounds, levels[-1:]])
        widths = edges[1:] - edges[:-1]
        uniform = torch.rand(quantized.values.shape, generator=generator, device=generator.device)
        latents = uniform.to(levels.device).mul_(1 - 2 * _MARGIN).add_(_MARGIN)
        for rows in row_blocks(latents):
            cells = quantized.values[rows].int()
            cells = cells if codes is None else ranks[cells]
            latents[rows] = edges[cells] + latents[rows] * widths[cells]
            blocks = latents[rows].unflatten(-1, (quantized.scale.shape[-1], -1))
            extreme = ((cells == 0) | (cells == len(levels) - 1)).view_as(blocks)
            exact = extreme & (extreme.cumsum(-1) == 1)
            blocks.copy_(torch.where(exact, levels[cells].view_as(blocks), blocks))
            blocks.mul_(quantized.scale[rows].float().unsqueeze(-1))
        return self._checked_dither(latents, quantized)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"group_size={self.group_size}"

    def _tables(self, device: torch.device) -> Tables:
        return tables(self.levels, device)

    @torch.no_grad()
    def _quantized_values(self, weight: Tensor) -> Tensor:
        num_groups = self._num_groups(weight)
        levels = self._tables(weight.device).levels
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        for rows in row_blocks(weight):
            ranks, scale = self._ranks(weight[rows], num_groups)
            torch.gather(levels.expand(ranks.shape[0], -1), 1, ranks, out=out[rows])
            out[rows].unflatten(-1, (num_groups, -1)).mul_(scale.unsqueeze(-1))
        return out

    def _ranks(self, weight: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
        """Return the ranks of the levels int64 [O, I] and the absolute maxima fp32 [O, G] of ``weight`` [O, I]."""
        bounds = self._tables(weight.device).bounds
        blocks = weight.float().unflatten(-1, (num_groups, -1))
        scale = blocks.abs().amax(-1)
        # bitsandbytes multiplies by the reciprocal; a quotient would give other codes next to a boundary.
        scaled = blocks * (1.0 / scale.clamp(min=_SMALLEST_ABSMAX)).unsqueeze(-1)
        return num_below(scaled, bounds).flatten(-2), scale

    def _num_groups(self, weight: Tensor) -> int:
        in_features = width_of(weight)
        if self.group_size is None or in_features % self.group_size:
            fitting = [str(size) for size in _BLOCK_SIZES if in_features % size == 0]
            raise ValueError(
                f"in_features={in_features} is not divisible by group_size={self.group_size}: "
                + (
                    f"use {', '.join(fitting)}"
                    if fitting
                    else f"no {self.kind} block size fits, use an int grid for this layer"
                )
            )
        return in_features // self.group_size
