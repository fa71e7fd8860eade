"""What becomes of each linear layer of the blocks: latents to train through a grid, or a frozen storage."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qaft.bases import build_base
from qaft.bases.base import FrozenLinear
from qaft.bases.dense import DenseBase
from qaft.errors import ModelError, RecipeError
from qaft.models.latents import off_grid
from qaft.quant import Q4_0, Q8_0, build_quantizer
from qaft.quant.affine import Affine
from qaft.quant.base import Quantizer
from qaft.quant.codebook import CodeBook
from qaft.quant.ggml import GgmlBlocks
from qaft.sections import GridSection, ModelSection, QatSection

log = logging.getLogger(__name__)

Named = Callable[[str], bool]
"""A set of layers, by module path."""

GRID_STORAGES: dict[str, int] = {"int4": 4, "int8_group": 8}
"""Storages on an affine grid, and the bits of their codes."""

GGUF_KINDS = ("q4_0", "q8_0")
"""Grids of ``qat.weights`` that are a block format of GGUF with integer codes."""


def frozen_quantizer(section: ModelSection, qat: QatSection | None) -> Affine | GgmlBlocks | None:
    """Return the grid of ``int4`` and ``int8_group`` layers, grouped like an affine ``qat.weights``, or None.

    Beside a block format of GGUF they are its formats of that width, Q4_0 and Q8_0.
    """
    if section.storage not in GRID_STORAGES:
        return None
    if qat is not None and qat.weights.kind in GGUF_KINDS:
        return Q4_0() if GRID_STORAGES[section.storage] == 4 else Q8_0()
    if qat is not None and qat.weights.kind == "int":
        grid = qat.weights
    else:
        grid = GridSection.model_validate({"group_size": section.group_size})
    grid = grid.model_copy(update={"bits": GRID_STORAGES[section.storage]})
    quantizer = build_quantizer(grid, scale_dtype=getattr(torch, section.dtype))
    assert isinstance(quantizer, Affine)
    return quantizer


class LayerBuilder:
    """Turns the weight of a named layer into its frozen module.

    Args:
        section: storage and dtype.
        qat: the grid of the latents, or None.
        latent: layers that are trained through the grid.
        adapted: layers that are trained on top of their storage; updates may be merged into them, so their block scales
            are not quantized.
        seed: of the dither.

    Attributes:
        frozen_quantizer: the grid of packed frozen layers, if their storage has one.
        dithered: latents that were moved off their own grid.

    Raises:
        RecipeError: double_quant with a storage that has no block scales.
    """

    def __init__(
        self, section: ModelSection, qat: QatSection | None, *, latent: Named, adapted: Named, seed: int
    ) -> None:
        if section.double_quant and section.storage not in ("nf4", "fp4"):
            raise RecipeError(
                f"model.double_quant=true needs model.storage nf4 or fp4, not {section.storage}: only they have block "
                "scales to quantize; leave it out"
            )
        self.frozen_quantizer = frozen_quantizer(section, qat)
        self.dithered: list[str] = []
        self._section = section
        self._dtype: torch.dtype = getattr(torch, section.dtype)
        self._grid = None if qat is None else build_quantizer(qat.weights, scale_dtype=self._dtype)
        self._latent = latent
        self._adapted = adapted
        self._seed = seed

    def check_groups(self, linears: Mapping[str, nn.Linear]) -> None:
        """Refuse a group size that does not divide the width of a layer, before anything is read.

        Raises:
            ModelError: the message names the layer, its width, and the sizes that fit every layer of that grid.
        """
        for key, grid, names in (
            ("qat.weights", self._grid, [n for n in linears if self._is_trained_on_grid(n)]),
            (
                f"model.storage {self._section.storage}, grouped by qat.weights or else model.group_size",
                self.frozen_quantizer,
                [n for n in linears if not self._is_trained_on_grid(n)],
            ),
        ):
            if grid is not None and grid.group_size is not None:
                widths = {name: linears[name].in_features for name in names}
                _check_widths(key, grid, widths)

    def build(self, name: str, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        """Return the frozen layer for ``weight`` [O, I] and ``bias`` [O]."""
        if self._is_trained_on_grid(name):
            return self._latents(name, weight, bias)
        return build_base(
            self._section.storage,
            weight,
            bias,
            dtype=self._dtype,
            grid_quantizer=self.frozen_quantizer,
            double_quant=self._section.double_quant and not self._adapted(name),
        )

    def report(self) -> None:
        """Log how many latents had to be moved off their grid."""
        if self.dithered:
            log.warning(
                "%d layers lay on their own grid (a checkpoint that was quantized before), where small updates would "
                "have no effect: their latents start at random points of the same cells, in fp32; the first forward is "
                "unchanged. First: %s",
                len(self.dithered),
                self.dithered[0],
            )

    def _is_trained_on_grid(self, name: str) -> bool:
        return self._grid is not None and self._latent(name)

    def _latents(self, name: str, weight: Tensor, bias: Tensor | None) -> DenseBase:
        assert self._grid is not None
        latents, moved = off_grid(weight, self._grid, name=name, seed=self._seed)
        if moved:
            self.dithered.append(name)
        else:
            latents = latents.to(self._dtype)
        return DenseBase(latents, None if bias is None else bias.to(self._dtype), dtype=self._dtype)


def _check_widths(key: str, grid: Quantizer, widths: Mapping[str, int]) -> None:
    size = grid.group_size
    assert size is not None
    wrong = next((name for name, width in widths.items() if width % size), None)
    if wrong is None:
        return
    common = math.gcd(*widths.values())
    affine = isinstance(grid, Affine)
    sizes = [s for s in range(8, min(common, 1024) + 1) if common % s == 0 and _exists(grid, s)]
    channel = ["null (one scale per channel)"] if affine else []
    raise ModelError(
        f"{wrong}: its width {widths[wrong]} is not divisible by group_size={size} ({key}); group sizes that fit every "
        f"layer: {', '.join([*map(str, sizes), *channel]) or 'none, use kind int'}"
    )


def _exists(grid: Quantizer, size: int) -> bool:
    """Return whether grids of this kind come in groups of ``size``."""
    if isinstance(grid, CodeBook):
        # The block sizes of bitsandbytes: powers of two from 32.
        return size >= 32 and size & (size - 1) == 0
    return isinstance(grid, Affine)
