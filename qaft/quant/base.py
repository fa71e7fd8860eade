"""The weight grid: one object quantizes in training and writes the exported integers.

    Q1:  Q(Q(w)) == Q(w)                     (dequantized in fp32)
    Q2:  |w - Q(w)| <= scale / 2             inside the grid's range
    Q3:  dQ/dw = 1 inside the range, 0 outside (see ``masks.py``); the scale is constant in backward

Shapes: O = out_features, I = in_features, G = number of groups along I.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class QTensor:
    """A weight on a grid: ``values`` are integers of the grid, not floats.

    Attributes:
        values: int8 [O, I]; for affine grids codes in [-2^(b-1), 2^(b-1)-1], for code books indices from 0.
        scale: [O, G], already rounded to the dtype in which it is stored; I must be divisible by G. May be negative.
        zero_point: int8 [O, G] in the same range as ``values``, or None for symmetric grids and code books.
        codebook: [K] fp32 levels for code-book grids, else None.
        tensor_scale: fp32 [], a factor of all scales, or None for 1. A power of two.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    codebook: Tensor | None = None
    tensor_scale: Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return ``(values - zero_point) * scale``, or ``codebook[values] * scale``, times ``tensor_scale``, [O, I].

        The product is formed in fp32 (exact for a 16-bit scale and codes of up to 8 bits), then rounded to ``dtype``.
        """
        if self.codebook is None:
            levels = self.values.float()
        else:
            levels = self.codebook[self.values.long()]
        levels = levels.unflatten(-1, (self.scale.shape[-1], -1))
        if self.zero_point is not None:
            levels = levels - self.zero_point.float().unsqueeze(-1)
        scale = self.scale.float() if self.tensor_scale is None else self.scale.float() * self.tensor_scale
        return (levels * scale.unsqueeze(-1)).flatten(-2).to(dtype)

    def equals(self, other: QTensor) -> bool:
        """Return whether both have the same codes, scales and zero points, bit for bit and in the same dtypes."""
        pairs = (
            (self.values, other.values),
            (self.scale, other.scale),
            (self.zero_point, other.zero_point),
            (self.tensor_scale, other.tensor_scale),
        )
        return all(
            a is b or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs
        )


_BLOCK_WEIGHTS = 2**18
"""Weights per CPU thread and block: 1 MiB in fp32, within the second-level cache of current server cores."""

_DEVICE_BLOCK_WEIGHTS = 2**24
"""Weights per block on other devices: few launches, and temporaries of 64 MiB in fp32 whatever the matrix."""


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Yield slices that cover the rows of ``weight`` [O, I], small enough that several passes over one are cheap.

    On a CPU every pass over a whole matrix goes to main memory, several passes over a block stay in the caches. On
    other devices blocks bound the memory of temporaries.
    """
    num_rows, row_length = weight.shape
    on_cpu = weight.device.type == "cpu"
    block = _BLOCK_WEIGHTS * torch.get_num_threads() if on_cpu else _DEVICE_BLOCK_WEIGHTS
    step = max(1, block // max(1, row_length))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def width_of(weight: Tensor) -> int:
    """Return the number of inputs of ``weight``, which is a matrix with at least one.

    Raises:
        ValueError: it is not.
    """
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(
            f"the weight {list(weight.shape)} cannot be quantized: it must be [out_features, in_features] with at least"
            " one input; parameters that an engine has partitioned must be gathered first"
        )
    return weight.shape[1]


class Quantizer(nn.Module, ABC):
    """A weight grid that is both the fake quantizer of training and the serializer of exports. Holds no state.

    Attributes:
        bits: stored bits per weight, without scales.
        group_size: weights that share a scale along I; None for one scale per output channel.
        symmetric: whether zero is code 0 without a zero point.
    """

    bits: int
    group_size: int | None
    symmetric: bool

    @abstractmethod
    def quantize(self, weight: Tensor) -> QTensor:
        """Return the nearest grid point of ``weight`` [O, I]; computed in fp32, without gradient.

        Raises:
            ValueError: I is not divisible by the group size.
        """

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """Return ``quantize(weight).dequantize`` in fp32 with the straight-through gradient, [O, I] -> [O, I]."""

    @property
    def can_dither(self) -> bool:
        """Whether ``dither`` exists: latents with given codes and scales can be constructed."""
        return True

    def _checked_dither(self, latents: Tensor, quantized: QTensor) -> Tensor:
        """Return ``latents`` when they quantize to exactly ``quantized``."""
        if not self.quantize(latents).equals(quantized):
            raise ValueError(
                f"these codes and scales are no result of {type(self).__name__}({self.extra_repr()}), so no latent "
                "weight quantizes to them: dequantize them, and quantize with this grid first"
            )
        return latents

    @abstractmethod
    def dither(self, quantized: QTensor, generator: torch.Generator) -> Tensor:
        """Return fp32 latents, off the grid, whose codes and scales are exactly ``quantized``, [O, I].

        Raises:
            ValueError: there are none; see ``can_dither``.
        """
