"""``compressed-tensors``: packed integers (W4A16, W8A16) for transformers and vLLM.

Codes, scales and zero points are the trained ones, copied and never derived again:

    weight_packed       int32 [O, ceil(I bits / 32)]        weight_scale   [O, G]         weight_shape   int64 [2]
    weight_zero_point   int32 [ceil(O bits / 32), G]        asymmetric grids only

Layers that are dense in the run stay dense. Source of the layout: compressed-tensors 0.20, ``pack-quantized``.

Shapes: O = out_features, I = in_features, G = groups along I.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor, nn

from qaft.bases.affine import AffineBase
from qaft.bases.dense import DenseBase
from qaft.errors import ExportError
from qaft.export.base import EXACT, ExportInfo, ExportReport, Linear, Written
from qaft.export.checkpoint_writer import CheckpointWriter, shard_bytes, to_dtype
from qaft.export.hf_files import write_hf_files
from qaft.export.publish import publish
from qaft.export.quantization_config import PACKABLE_BITS, PackedGrid, quantization_config
from qaft.export.survival import Survival, require_survival, survival, survival_table
from qaft.export.tensors import (
    is_exact,
    is_tied,
    linear_layers,
    merged_weight,
    model_dtype,
    model_parts,
    require_plain_options,
    require_portable,
)
from qaft.layers.adapted import AdaptedLinear
from qaft.quant.affine import Affine
from qaft.quant.base import QTensor
from qaft.quant.packing import pack_int32, pack_zero_point

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel
    from qaft.sections import ExportSection

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM joins into one, which has one grid."""


@dataclass
class _Plan:
    """How each linear layer is written: ``codes`` of packed layers, on ``grids``; all others are dense."""

    grids: dict[str, PackedGrid] = field(default_factory=dict)
    codes: dict[str, Callable[[], QTensor]] = field(default_factory=dict)
    requantized: dict[str, Affine] = field(default_factory=dict)


def export_compressed(loaded: LoadedModel, section: ExportSection, folder: Path, info: ExportInfo) -> ExportReport:
    """Packed 4- or 8-bit integers in the compressed-tensors format, for transformers and vLLM.

    Raises:
        ExportError: see ``Exporter``; or a grid cannot be packed, nothing is on one, or the update would not survive.
        DifferenceError: the reload differs by more than its bound.
    """
    require_plain_options(section)
    layers = linear_layers(loaded.model)
    require_portable(layers)
    plan = _plan(loaded, layers, force=section.force)
    rows = [_survival(name, layers[name], grid) for name, grid in plan.requantized.items()]
    if rows:
        Console(stderr=True).print(survival_table(rows))
        require_survival(rows, force=section.force)
    return publish(loaded, section, folder, info, write=partial(_write, loaded, section, plan, rows))


def _plan(loaded: LoadedModel, layers: dict[str, Linear], *, force: bool) -> _Plan:
    plan, dtype = _Plan(), model_dtype(loaded)
    for name, layer in layers.items():
        base = layer.base if isinstance(layer, AdaptedLinear) else layer
        if isinstance(layer, AdaptedLinear) and layer.quantizer is not None:
            grid = _packable(name, layer.quantizer, dtype)
            plan.codes[name] = partial(_trained_codes, layer)
        elif isinstance(base, DenseBase):
            continue
        elif isinstance(layer, AffineBase):
            symmetric, groups = layer.weight_zero_point is None, layer.weight_scale.shape[1]
            _require_readable(name, layer.bits, layer.weight_scale.dtype, dtype)
            grid = PackedGrid(layer.bits, None if groups == 1 else layer.in_features // groups, symmetric)
            plan.codes[name] = layer.qtensor
        else:
            quantizer = _requantizer(loaded, layers, name, base, force=force)
            grid = _packable(name, quantizer, dtype)
            plan.requantized[name] = quantizer
            plan.codes[name] = partial(_requantized_codes, layer, quantizer)
        plan.grids[name] = grid
    if not plan.grids:
        raise ExportError(
            "compressed-tensors: no layer of this run is on a grid, so there is nothing to pack; add a qat section, or "
            "set model.storage to int4 or int8_group, or export `merged` or `peft`"
        )
    return plan


def _packable(name: str, quantizer: nn.Module, dtype: torch.dtype) -> PackedGrid:
    if not isinstance(quantizer, Affine):
        raise ExportError(
            f"{name}: its grid {type(quantizer).__name__} is a code book, but the packed format holds affine integers; "
            "set qat.weights.kind to int, or export `merged`"
        )
    _require_readable(name, quantizer.bits, quantizer.scale_dtype, dtype)
    return PackedGrid(quantizer.bits, quantizer.group_size, quantizer.symmetric)


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


@torch.no_grad()
def _latent(layer: Linear) -> Tensor:
    return layer.latent() if isinstance(layer, AdaptedLinear) else layer.dequantize().float()


def _trained_codes(layer: AdaptedLinear) -> QTensor:
    codes = layer.quantized()
    assert codes is not None
    return codes


def _requantized_codes(layer: Linear, quantizer: Affine) -> QTensor:
    return quantizer.quantize(_latent(layer))


def _survival(name: str, layer: Linear, quantizer: Affine) -> Survival:
    base = (layer.base if isinstance(layer, AdaptedLinear) else layer).dequantize().float()
    updated = _latent(layer)
    return survival(name, base, updated, _served(quantizer, base), _served(quantizer, updated))


def _served(quantizer: Affine, weight: Tensor) -> Tensor:
    return quantizer.quantize(weight).dequantize(torch.float32)


def _write(loaded: LoadedModel, section: ExportSection, plan: _Plan, rows: list[Survival], folder: Path) -> Written:
    dtype = model_dtype(loaded)
    writer = CheckpointWriter(folder, max_shard_bytes=shard_bytes(section.max_shard_gb))
    for name, part in model_parts(loaded.model):
        if isinstance(part, Tensor):
            writer.add(name, to_dtype(name, part, dtype))
            continue
        if name in plan.codes:
            _add_packed(writer, name, plan.codes[name](), plan.grids[name].bits)
        else:
            writer.add(f"{name}.weight", to_dtype(name, merged_weight(part, dtype), dtype))
        if part.bias is not None:
            writer.add(f"{name}.bias", to_dtype(name, part.bias, dtype))
    writer.close()
    write_hf_files(
        loaded,
        folder,
        config=loaded.model.config,
        dtype=dtype,
        tied=is_tied(loaded.model),
        quantization=quantization_config(plan.grids, _dense_linears(loaded.model, plan)),
    )
    return Written(
        dtype=dtype,
        bound=EXACT,
        exported_weight=None if _is_live(loaded, plan, dtype) else partial(_exported_weight, plan, dtype),
        basis="original" if loaded.fusion is None else "fused",
        grids=tuple(grid.describe() for grid in dict.fromkeys(plan.grids.values())),
        notes=_notes(plan, rows),
    )


def _add_packed(writer: CheckpointWriter, name: str, codes: QTensor, bits: int) -> None:
    to_dtype(f"{name}.weight_scale", codes.scale, codes.scale.dtype)
    writer.add(f"{name}.weight_packed", pack_int32(codes.values, bits))
    writer.add(f"{name}.weight_scale", codes.scale)
    writer.add(f"{name}.weight_shape", torch.tensor(codes.values.shape))
    if codes.zero_point is not None:
        writer.add(f"{name}.weight_zero_point", pack_zero_point(codes.zero_point, bits))


def _dense_linears(model: nn.Module, plan: _Plan) -> list[str]:
    """Return the linear layers that stay dense, as a reader names them; the head is one also where it is tied."""
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or m is head]
    return [*dict.fromkeys([*(n for n in linear_layers(model) if n not in plan.codes), *names])]


def _is_live(loaded: LoadedModel, plan: _Plan, dtype: torch.dtype) -> bool:
    """Return whether the live forward uses exactly the exported weights."""
    return not plan.requantized and all(is_exact(layer, dtype) for layer in linear_layers(loaded.model).values())


def _exported_weight(plan: _Plan, dtype: torch.dtype, name: str, layer: Linear) -> Tensor:
    return plan.codes[name]().dequantize(dtype) if name in plan.codes else merged_weight(layer, dtype)


def _notes(plan: _Plan, rows: list[Survival]) -> tuple[str, ...]:
    notes = []
    if any(not grid.symmetric for grid in plan.grids.values()):
        notes.append(
            "transformers unpacks asymmetric weights while it loads: there the model takes the memory of 16 bits"
        )
    shares = [row.share for row in rows if row.share is not None]
    if shares:
        notes.append(f"requantized with force: between {min(shares):.1%} and {max(shares):.1%} of each update survives")
    for joined in _FUSED:
        by_parent: dict[str, set[PackedGrid | None]] = {}
        parents = {name.rpartition(".")[0] for name in plan.grids if name.rpartition(".")[2] in joined}
        for parent in parents:
            by_parent[parent] = {plan.grids.get(f"{parent}.{leaf}") for leaf in joined}
        if any(len(grids) > 1 for grids in by_parent.values()):
            notes.append(f"{', '.join(joined)} are on different grids: transformers loads that, vLLM needs them on one")
    return tuple(notes)
