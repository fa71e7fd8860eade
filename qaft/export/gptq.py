"""``gptq``: 4- and 8-bit groups in the layout of AutoGPTQ, for vLLM, and for transformers with GPTQModel and optimum.

Codes and zero points are the trained ones; scales are held in fp16, which must not round them. All layers lie on one
grid, because transformers reads one from ``quantization_config``; in every block the same layers may stay dense.
Source of the layout: ``gptq_layout.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qaft import __version__
from qaft.bases.affine import AffineBase
from qaft.errors import ExportError
from qaft.export.base import ExportInfo, ExportReport, Linear
from qaft.export.gptq_layout import WORD_BITS, gptq_tensors
from qaft.export.hf_files import write_json
from qaft.export.packed_model import PackedFormat, PackedLayer, export_packed
from qaft.export.survival import latent
from qaft.export.tensors import linear_layers, model_dtype
from qaft.layers.adapted import AdaptedLinear
from qaft.quant.affine import Affine
from qaft.quant.base import QTensor, Quantizer

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel
    from qaft.sections import ExportSection

BITS = (4, 8)
QUANTIZE_CONFIG = "quantize_config.json"
_KERNEL_ALIGNMENT = 64


def export_gptq(loaded: LoadedModel, section: ExportSection, folder: Path, info: ExportInfo) -> ExportReport:
    """4- or 8-bit groups in the GPTQ layout; loads in vLLM, and in transformers with optimum and gptqmodel.

    Raises:
        ExportError: see ``Exporter``; or a layer is on no affine grid of 4 or 8 bits, layers lie on several, its scales
            are no numbers of fp16, or the update would not survive.
        DifferenceError: the reload differs by more than its bound.
    """
    layers = linear_layers(loaded.model)
    format = PackedFormat(
        pack=partial(_pack, loaded.frozen_quantizer),
        config=_config,
        notes=partial(_notes, model_dtype(loaded), layers),
        empty="add a qat section, or set model.storage to int4 or int8_group, or export `merged`",
        files=lambda stage, values: write_json(stage / QUANTIZE_CONFIG, values),
    )
    return export_packed(loaded, section, folder, info, format)


def _pack(frozen: Quantizer | None, name: str, layer: Linear) -> PackedLayer:
    if isinstance(layer, AdaptedLinear):
        trained = layer.quantizer is not None
        grid = layer.quantizer if trained else frozen
        if isinstance(grid, Affine) and (trained or isinstance(layer.base, AffineBase)):
            return _on_grid(name, layer, grid, requantized=not trained)
    elif isinstance(layer, AffineBase):
        groups = layer.weight_scale.shape[1]
        group_size = None if groups == 1 else layer.in_features // groups
        return _layer(name, layer, layer.bits, group_size, layer.weight_zero_point is None, layer.qtensor)
    raise ExportError(
        f"{name}: is on no affine grid of groups, which this format holds; set qat.weights.kind to int and "
        "model.storage to int4 (bits 4), int8_group (bits 8) or bf16, or export `merged`"
    )


def _on_grid(name: str, layer: AdaptedLinear, grid: Affine, *, requantized: bool) -> PackedLayer:
    codes = partial(_codes, layer, grid)
    packed = _layer(name, layer, grid.bits, grid.group_size, grid.symmetric, codes)
    if not requantized:
        return packed
    weight = lambda: codes().dequantize(layer.dtype).float()  # noqa: E731
    return PackedLayer(grid=packed.grid, tensors=packed.tensors, weight=weight, requantized=grid)


@torch.no_grad()
def _codes(layer: AdaptedLinear, grid: Affine) -> QTensor:
    return grid.quantize(latent(layer))


def _layer(name: str, layer: Linear, bits: int, group_size: int | None, symmetric: bool, codes: Any) -> PackedLayer:
    if bits not in BITS:
        raise ExportError(
            f"{name}: {bits}-bit weights, but readers of this format that are in use have "
            f"{' and '.join(map(str, BITS))} bits; export `merged`"
        )
    if layer.in_features * bits % WORD_BITS:
        raise ExportError(
            f"{name}: {layer.in_features} codes of {bits} bits do not fill words of {WORD_BITS} bits, in which this "
            "format has them; export `compressed-tensors` or `merged`"
        )
    return PackedLayer(
        grid={"kind": "int", "bits": bits, "group_size": group_size, "symmetric": symmetric},
        tensors=lambda: gptq_tensors(name, codes(), bits),
    )


def _config(packed: Mapping[str, PackedLayer], dense: list[str]) -> Mapping[str, Any]:
    """Return the section as AutoGPTQ and GPTQModel write it.

    Raises:
        ExportError: there are several grids, or blocks have different dense layers.
    """
    grids = {tuple(layer.grid.values()): name for name, layer in packed.items()}
    if len(grids) > 1:
        names = " and ".join(f"{name} {dict(packed[name].grid)}" for name in grids.values())
        raise ExportError(
            f"layers lie on {len(grids)} grids ({names}), and transformers reads one for all; set model.storage to "
            "int4 with qat.weights.bits 4, to int8_group with bits 8, or to bf16, or export `compressed-tensors`"
        )
    grid = next(iter(packed.values())).grid
    places = list(dict.fromkeys(_place(name) for name in packed))
    mixed = [name for name in dense if _place(name) in places]
    if mixed:
        raise ExportError(
            f"{mixed[0]} is dense and the same layer of another block is packed, but transformers packs the same "
            "layers of every block; select them in every block, or export `compressed-tensors`"
        )
    return {
        "quant_method": "gptq",
        "bits": grid["bits"],
        "group_size": -1 if grid["group_size"] is None else grid["group_size"],
        "sym": grid["symmetric"],
        "desc_act": False,
        "checkpoint_format": "gptq" if grid["symmetric"] else "gptq_v2",
        "modules_in_block_to_quantize": [places],
        "lm_head": False,
        "damp_percent": 0.1,
        "true_sequential": True,
        "meta": {"quantizer": [f"qaft:{__version__}"]},
    }


def _place(name: str) -> str:
    """Return the path of a layer within its block: ``mlp.up_proj`` for ``model.layers.3.mlp.up_proj``."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _notes(dtype: torch.dtype, layers: Mapping[str, Linear], packed: Mapping[str, PackedLayer]) -> tuple[str, ...]:
    notes = []
    grid = next(iter(packed.values())).grid
    if not grid["symmetric"]:
        notes.append("zero points as gptq_v2: GPTQModel reads that; vLLM's Marlin kernels take symmetric grids only")
    if dtype != torch.float16:
        notes.append(
            f"GPTQModel multiplies code and scale in fp16 before it rounds to {str(dtype).removeprefix('torch.')}; "
            "this file was compared with one rounding, as vLLM computes"
        )
    odd = [n for n in packed if layers[n].in_features % _KERNEL_ALIGNMENT or layers[n].out_features % _KERNEL_ALIGNMENT]
    if odd:
        notes.append(
            f"{len(odd)} layers are no multiple of {_KERNEL_ALIGNMENT} wide or high ({odd[0]}): vLLM's kernels may "
            "refuse them"
        )
    return tuple(notes)
