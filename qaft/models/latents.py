"""Latents off their own grid: a weight that starts *on* the grid does not feel small updates.

    on the grid:   Q(W + D) == W           for every |D| < scale / 2
    off the grid:  E[Q(W + D)] - Q(W) = D  when W / scale has a uniform fractional part

A checkpoint that was quantized before is on its grid. Such a weight is replaced by a random one in the same cells: the
codes, and so the first forward, stay what they are.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from qaft.errors import ModelError
from qaft.quant.base import Quantizer

ON_GRID = 0.5
"""A distance below this counts as on the grid. Off-grid weights measure 1; dequantized weights rounded to bf16 measure
less than 0.1 with 4 bits and 0.3 with 8 bits."""

_SAMPLED_ROWS = 64


def grid_distance(weight: Tensor, quantizer: Quantizer, generator: torch.Generator) -> float:
    """Return the distance of ``weight`` [O, I] from its grid, relative to that of a random weight in the same cells.

    0 means on the grid, about 1 anywhere in the cells. Measured on at most 64 rows, evenly spaced.
    """
    rows = _sample(weight)
    quantized = quantizer.quantize(rows)
    nearest = quantized.dequantize(torch.float32)
    spread = (quantizer.dither(quantized, generator) - nearest).norm()
    # Without any spread (a weight of zeros) there are no cells to start in.
    return float((rows - nearest).norm() / spread) if spread > 0 else 1.0


def _sample(weight: Tensor) -> Tensor:
    """Return at most 64 rows of ``weight`` [O, I], evenly spaced, fp32."""
    return weight[:: max(1, weight.shape[0] // _SAMPLED_ROWS)][:_SAMPLED_ROWS].float()


def off_grid(weight: Tensor, quantizer: Quantizer, *, name: str, seed: int) -> tuple[Tensor, bool]:
    """Return latents for ``weight`` [O, I], and whether they had to be moved off the grid (then they are fp32).

    Args:
        weight: the weight to be trained through ``quantizer``.
        quantizer: its grid.
        name: the layer; each layer gets its own randomness, independent of the order of loading.
        seed: of the run.

    Raises:
        ModelError: the weight lies on a grid whose latents cannot be constructed.
    """
    if not quantizer.can_dither:
        rows = _sample(weight)
        if rows.any() and torch.equal(quantizer(rows), rows):
            raise ModelError(
                f"{name}: the weight lies on the grid of qat.weights already, where small updates have no effect, and "
                "a range that is fitted anew has no other start with the same codes; set qat.weights.range to absmax "
                "and leave out clip"
            )
        return weight, False
    # The generator of the CPU uses the lower 32 bits of its seed only: both go into them.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if grid_distance(weight, quantizer, generator) >= ON_GRID:
        return weight, False
    return quantizer.dither(quantizer.quantize(weight), generator), True
