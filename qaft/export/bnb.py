"""``bnb``: NF4, FP4 and int8 weights as bitsandbytes stores them, for transformers and vLLM without an argument.

    trained through nf4 or fp4             codes and block maxima of training        frozen in nf4 or fp4   its bytes
    trained through int 8, per channel     codes, SCB = 127 s                        frozen in int8         its bytes

transformers loads a checkpoint either in 4 or in 8 bits. NF4 and FP4 layers may stand side by side: the config names
one of them (here that of most layers), but each packed weight names its own, and that is the one that is read. Layers
that are dense in the run stay dense, under ``llm_int8_skip_modules``. Source of the layout: ``bases/bnb_layout.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from qaft.bases.affine import AffineBase
from qaft.errors import ExportError
from qaft.export.base import ExportInfo, ExportReport, Linear
from qaft.export.packed_model import PackedFormat, PackedLayer, export_packed
from qaft.export.survival import latent
from qaft.export.tensors import linear_layers, model_dtype
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.inputs import input_of
from qaft.quant import CODE_BOOKS
from qaft.quant.activation import TokenQuantizer
from qaft.quant.affine import Affine
from qaft.quant.base import QTensor, Quantizer
from qaft.quant.codebook import CodeBook

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel
    from qaft.sections import ExportSection

OUTLIER_THRESHOLD = 6.0
"""Columns of an input with a larger value are multiplied in 16 bits: the value of the paper (arXiv 2208.07339)."""

_CPU_ROWS = 32
_WAY_OUT = (
    "set qat.weights to kind nf4 or fp4, or to bits 8 with group_size null; model.storage to nf4, fp4, int8 or bf16; "
    "or export `compressed-tensors` or `merged`"
)


def export_bnb(loaded: LoadedModel, section: ExportSection, folder: Path, info: ExportInfo) -> ExportReport:
    """NF4, FP4 or int8 weights, pre-quantized for bitsandbytes; loads in transformers and vLLM.

    Raises:
        ExportError: see ``Exporter``; or a layer is on a grid that bitsandbytes does not have, or 4 and 8 bits are
            mixed, or the update would not survive.
        DifferenceError: the reload differs by more than its bound.
    """
    dtype, threshold = model_dtype(loaded), outlier_threshold(loaded)
    format = PackedFormat(
        pack=partial(_pack, dtype),
        config=partial(_config, dtype, threshold),
        notes=partial(_notes, threshold, linear_layers(loaded.model)),
        empty="set qat.weights.kind to nf4 or fp4 (or bits 8 per channel) or model.storage to nf4, fp4 or int8, or "
        "export `merged`",
    )
    return export_packed(loaded, section, folder, info, format)


def outlier_threshold(loaded: LoadedModel) -> float:
    """Return the threshold of LLM.int8: 0, so none, where training has quantized every input to 8 bits as it does."""
    quantizers = [before and before.quantizer for before in map(input_of, linear_layers(loaded.model).values())]
    return 0.0 if all(map(_is_llm_int8, quantizers)) else OUTLIER_THRESHOLD


def _is_llm_int8(quantizer: object) -> bool:
    if not isinstance(quantizer, TokenQuantizer):
        return False
    return quantizer.bits == 8 and quantizer.symmetric and quantizer.clip == 1


def _pack(dtype: torch.dtype, name: str, layer: Linear) -> PackedLayer:
    if not isinstance(layer, AdaptedLinear):
        return _frozen(name, layer)
    if layer.quantizer is not None:
        return _on_grid(name, layer, layer.quantizer, dtype, requantized=False)
    return _on_grid(name, layer, _grid_of_storage(name, layer), dtype, requantized=True)


def _on_grid(name: str, layer: Linear, grid: Quantizer, dtype: torch.dtype, *, requantized: bool) -> PackedLayer:
    from qaft.bases.bnb_layout import four_bit_tensors

    again = grid if requantized else None
    if isinstance(grid, CodeBook):
        return PackedLayer(
            grid=_four_bits(grid.kind, grid.group_size),
            tensors=lambda: four_bit_tensors(_codes(layer, grid), dtype=dtype, quant_type=grid.kind),
            weight=(lambda: _codes(layer, grid).dequantize(dtype).float()) if requantized else None,
            requantized=again,
        )
    if isinstance(grid, Affine) and _fits_int8(grid.bits, grid.group_size is None, grid.symmetric):
        if grid.range.kind == "signed_absmax":
            raise ExportError(f"{name}: range signed_absmax has negative scales, and SCB is a maximum; {_WAY_OUT}")
        return _int8(lambda: _affine_parts(_codes(layer, grid)), again)
    raise ExportError(f"{name}: bitsandbytes has no grid {type(grid).__name__}({grid.extra_repr()}); {_WAY_OUT}")


@torch.no_grad()
def _codes(layer: Linear, grid: Quantizer) -> QTensor:
    return grid.quantize(latent(layer))


def _fits_int8(bits: int, per_channel: bool, symmetric: bool) -> bool:
    return bits == 8 and per_channel and symmetric


def _affine_parts(codes: QTensor) -> tuple[Tensor, Tensor]:
    # 127 s is exact in fp32: scales have 16 significant bits at most.
    return codes.values, codes.scale.flatten().float() * 127


def _int8(parts: Callable[[], tuple[Tensor, Tensor]], requantized: Quantizer | None = None) -> PackedLayer:
    """Return the layer for what ``parts`` returns: codes [O, I] and SCB [O]."""
    from qaft.bases.bnb import Int8Base
    from qaft.bases.bnb_layout import int8_tensors

    def weight() -> Tensor:
        codes, absmax = parts()
        return Int8Base(codes, absmax, None, dtype=torch.float32).dequantize()

    return PackedLayer(
        grid={"kind": "int", "bits": 8, "group_size": None, "symmetric": True},
        tensors=lambda: int8_tensors(*parts()),
        weight=weight,
        requantized=requantized,
    )


def _frozen(name: str, layer: Linear) -> PackedLayer:
    from qaft.bases.bnb import FourBitBase, Int8Base
    from qaft.bases.bnb_layout import frozen_four_bit_tensors

    if isinstance(layer, FourBitBase):
        grid = _four_bits(layer.quant_type, layer.block_size)
        return PackedLayer(grid=grid, tensors=partial(frozen_four_bit_tensors, layer))
    if isinstance(layer, Int8Base):
        return _int8(lambda: (layer.codes, layer.absmax))
    if isinstance(layer, AffineBase):
        symmetric, per_channel = layer.weight_zero_point is None, layer.weight_scale.shape[1] == 1
        if _fits_int8(layer.bits, per_channel, symmetric) and bool((layer.weight_scale > 0).all()):
            return _int8(lambda: _affine_parts(layer.qtensor()))
    raise ExportError(
        f"{name}: is stored as {type(layer).__name__}({layer.extra_repr()}), which bitsandbytes does not have, and "
        f"another grid would be a second rounding; {_WAY_OUT}"
    )


def _four_bits(quant_type: str | None, block_size: int | None) -> dict[str, Any]:
    return {"kind": quant_type, "bits": 4, "group_size": block_size, "symmetric": True}


def _grid_of_storage(name: str, layer: AdaptedLinear) -> Quantizer:
    """Return the grid that a packed base is on, for an update that was not trained through it."""
    from qaft.bases.bnb import FourBitBase, Int8Base

    base = layer.base
    if isinstance(base, FourBitBase) and base.quant_type in CODE_BOOKS and base.nested_absmax is None:
        return CODE_BOOKS[base.quant_type](group_size=base.block_size)
    if isinstance(base, Int8Base):
        return Affine(bits=8, group_size=None, scale_dtype=torch.float32)
    raise ExportError(
        f"{name}: its update was not trained through a grid of bitsandbytes, and its base {type(base).__name__}"
        f"({base.extra_repr()}) has none that it could be put onto; add a qat section with weights of kind nf4 or fp4, "
        "or export `peft` or `merged`"
    )


def _config(
    dtype: torch.dtype, threshold: float, packed: Mapping[str, PackedLayer], dense: list[str]
) -> Mapping[str, Any]:
    by_bits = {layer.grid["bits"]: name for name, layer in packed.items()}
    if len(by_bits) > 1:
        raise ExportError(
            f"{by_bits[4]} has 4 bits and {by_bits[8]} has 8, but transformers loads a checkpoint of bitsandbytes in "
            "one of them; set model.storage to nf4 or fp4 (for 4-bit layers), int8 (for int8 layers) or bf16, or "
            "export `merged`"
        )
    kinds = Counter(layer.grid["kind"] for layer in packed.values())
    if 8 in by_bits:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_skip_modules=dense)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=dense,
            bnb_4bit_quant_type=kinds.most_common(1)[0][0],
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=False,
        )
    return {k: v for k, v in config.to_dict().items() if not k.startswith("_")}


def _notes(threshold: float, layers: Mapping[str, Linear], packed: Mapping[str, PackedLayer]) -> tuple[str, ...]:
    if any(layer.grid["bits"] == 8 for layer in packed.values()):
        outliers = f", but for columns with a value of {threshold:g} and more" if threshold else ""
        return (
            "bitsandbytes computes these layers as LLM.int8: it also rounds each token of their inputs to 8 bits"
            f"{outliers}; this file was compared by its weights, with inputs as they are",
        )
    notes = ["compared by its weights: on CPUs with AVX512-BF16 bitsandbytes rounds scales and inputs to bf16"]
    cut = [n for n, p in packed.items() if layers[n].in_features % p.grid["group_size"]]
    if cut:
        notes.append(
            f"rows of {len(cut)} layers end inside a block ({cut[0]}): on a CPU bitsandbytes 0.50 reads wrong scales "
            "there; load it on a GPU"
        )
    odd = [n for n in packed if layers[n].out_features % _CPU_ROWS]
    if odd:
        notes.append(
            f"{len(odd)} layers have a number of rows that is no multiple of {_CPU_ROWS} ({odd[0]}), which "
            "bitsandbytes 0.50 refuses on CPUs with AVX512-BF16"
        )
    return tuple(notes)
