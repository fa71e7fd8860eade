"""Which layers are packed, on which grid, and with which codes: the plan of a compressed-tensors export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qaft.bases.affine import AffineBase
from qaft.bases.dense import DenseBase
from qaft.errors import ExportError
from qaft.export.base import InputFunction, Linear
from qaft.export.quantization_config import PACKABLE_BITS, PackedGrid
from qaft.export.survival import Survival, latent, layer_survival
from qaft.export.tensors import is_exact, merged_weight, model_dtype
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.inputs import input_of
from qaft.quant.activation import TokenQuantizer
from qaft.quant.affine import Affine
from qaft.quant.base import QTensor
from qaft.quant.compressed_tokens import CompressedTensorsTokens

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel


@dataclass
class Packing:
    """How each linear layer is written: ``codes`` of packed layers, on ``grids``; all others are dense.

    Attributes:
        layers: every linear layer of the model, by module path.
        grids: layer -> its grid.
        codes: layer -> what returns its codes.
        requantized: layer -> the grid that it was not trained on.
    """

    layers: dict[str, Linear]
    grids: dict[str, PackedGrid] = field(default_factory=dict)
    codes: dict[str, Callable[[], QTensor]] = field(default_factory=dict)
    requantized: dict[str, Affine] = field(default_factory=dict)

    def is_live(self, dtype: torch.dtype) -> bool:
        """Return whether the live forward uses exactly the exported weights."""
        return not self.requantized and all(is_exact(layer, dtype) for layer in self.layers.values())

    def weight(self, dtype: torch.dtype, name: str, layer: Linear) -> Tensor:
        """Return the weight that the export holds for a layer, [O, I] in ``dtype``."""
        return self.codes[name]().dequantize(dtype) if name in self.codes else merged_weight(layer, dtype)

    def survival(self) -> list[Survival]:
        """Return what is left of the update of every layer that is quantized anew."""
        return [layer_survival(name, self.layers[name], grid) for name, grid in self.requantized.items()]

    @property
    def inputs(self) -> InputFunction | None:
        """Return whose function rounds the inputs of the layers, or None where they stay in 16 bits."""
        found = [quantizer for layer in self.layers.values() if (quantizer := _input_quantizer(layer)) is not None]
        if not found:
            return None
        return "compressed-tensors" if isinstance(found[0], CompressedTensorsTokens) else "vllm"


def plan_packing(loaded: LoadedModel, layers: dict[str, Linear], *, force: bool) -> Packing:
    """Return how ``layers``, all linear layers of the model, are written.

    Raises:
        ExportError: a grid cannot be packed, inputs are quantized as no reader does, or nothing is on a grid.
    """
    plan, dtype = Packing(layers), model_dtype(loaded)
    for name, layer in layers.items():
        base = layer.base if isinstance(layer, AdaptedLinear) else layer
        inputs = _input_bits(name, layer)
        if isinstance(layer, AdaptedLinear) and layer.quantizer is not None:
            grid = _packable(name, layer.quantizer, dtype, inputs)
            plan.codes[name] = partial(_trained_codes, layer)
        elif isinstance(base, DenseBase):
            continue
        elif isinstance(layer, AffineBase):
            symmetric, groups = layer.weight_zero_point is None, layer.weight_scale.shape[1]
            _require_readable(name, layer.bits, layer.weight_scale.dtype, dtype)
            group_size = None if groups == 1 else layer.in_features // groups
            grid = PackedGrid(layer.bits, group_size, symmetric, inputs)
            plan.codes[name] = layer.qtensor
        else:
            quantizer = _requantizer(loaded, layers, name, base, force=force)
            grid = _packable(name, quantizer, dtype, inputs)
            plan.requantized[name] = quantizer
            plan.codes[name] = partial(_requantized_codes, layer, quantizer)
        plan.grids[name] = grid
    if not plan.grids:
        raise ExportError(
            "compressed-tensors: no layer of this run is on a grid, so there is nothing to pack; add a qat section, or "
            "set model.storage to int4 or int8_group, or export `merged` or `peft`"
        )
    return plan


def _input_quantizer(layer: Linear) -> nn.Module | None:
    before = input_of(layer)
    return None if before is None else before.quantizer


def _input_bits(name: str, layer: Linear) -> int | None:
    """Return the width of the integers that the inputs of a layer are rounded to, or None for 16-bit inputs."""
    quantizer = _input_quantizer(layer)
    if quantizer is None:
        return None
    if not isinstance(quantizer, TokenQuantizer) or not quantizer.symmetric or quantizer.clip < 1:
        raise ExportError(
            f"{name}: its inputs are quantized by {quantizer}, but readers of the packed format round them to "
            "symmetric integers of the whole range of a token; train with qat.activations symmetric: true "
            "and clip: 1, or export `merged`"
        )
    return quantizer.bits


def _packable(name: str, quantizer: nn.Module, dtype: torch.dtype, inputs: int | None) -> PackedGrid:
    if not isinstance(quantizer, Affine):
        raise ExportError(
            f"{name}: its grid {type(quantizer).__name__} is a code book, but the packed format holds affine integers; "
            "set qat.weights.kind to int, or export `merged`"
        )
    _require_readable(name, quantizer.bits, quantizer.scale_dtype, dtype)
    return PackedGrid(quantizer.bits, quantizer.group_size, quantizer.symmetric, inputs)


def _require_readable(name: str, bits: int, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    if bits not in PACKABLE_BITS:
        raise ExportError(
            f"{name}: {bits}-bit weights, but readers of the packed format support "
            f"{' and '.join(map(str, PACKABLE_BITS))} bits; export `merged`"
        )
    if scale_dtype != dtype:
        # transformers casts scales to the dtype of the model while loading, which would move every weight.
        raise ExportError(
            f"{name}: scales in {scale_dtype} under a model in {dtype}: they must be equal; export `merged`"
        )


def _requantizer(loaded: LoadedModel, layers: dict[str, Linear], name: str, base: Linear, *, force: bool) -> Affine:
    """Return the grid onto which a layer is put that was not trained on one that can be packed."""
    trained = [layer.quantizer for layer in layers.values() if isinstance(layer, AdaptedLinear)]
    grids = [g for g in (loaded.frozen_quantizer, *trained) if isinstance(g, Affine)]
    if isinstance(base, AffineBase) and loaded.frozen_quantizer in grids:
        return grids[0]
    if not force or not grids:
        raise ExportError(
            f"{name}: is stored as {type(base).__name__}, and packing it would quantize it a second time, onto a grid "
            "that it was not trained on; set model.storage to int4 or int8_group (the export's own grid), or export "
            "`merged` or `peft`"
        )
    return grids[0]


def _trained_codes(layer: AdaptedLinear) -> QTensor:
    codes = layer.quantized()
    assert codes is not None
    return codes


def _requantized_codes(layer: Linear, quantizer: Affine) -> QTensor:
    return quantizer.quantize(latent(layer))
