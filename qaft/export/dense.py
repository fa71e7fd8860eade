"""``merged``: plain 16- or 32-bit weights that everything loads.

basis fused      Q(merge(W0)) as trained; norms are ones, embedding and head are two tensors
basis original   rotations and norms undone: R_out W R_in^T diag(1 / gamma); what was neither trained nor quantized is
                 copied from the checkpoint, so embedding, norms, head and tying are those of the base model
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qaft.bases.dense import DenseBase
from qaft.export.base import EXACT, FLOOR_16BIT, Bound, ExportInfo, ExportReport, Linear, Written
from qaft.export.checkpoint_writer import CheckpointWriter, shard_bytes, to_dtype
from qaft.export.hf_files import write_hf_files
from qaft.export.publish import publish
from qaft.export.tensors import (
    is_exact,
    is_tied,
    linear_layers,
    merged_weight,
    model_dtype,
    model_parts,
    require_portable,
)
from qaft.layers.adapted import AdaptedLinear
from qaft.models.reading import stored_names

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel
    from qaft.sections import ExportSection


def export_merged(loaded: LoadedModel, section: ExportSection, folder: Path, info: ExportInfo) -> ExportReport:
    """Plain 16- or 32-bit safetensors of the trained model, for every reader of transformers checkpoints.

    Raises:
        ExportError: see ``Exporter``; or a weight leaves the range of the dtype.
        ModelError: the original basis cannot be restored.
        DifferenceError: the reload differs by more than its bound.
    """
    require_portable(linear_layers(loaded.model))
    return publish(loaded, section, folder, info, write=partial(_write, loaded, section))


def _write(loaded: LoadedModel, section: ExportSection, folder: Path) -> Written:
    live_dtype = model_dtype(loaded)
    dtype = getattr(torch, section.dtype) if section.dtype else live_dtype
    original = section.basis == "original"
    writer = CheckpointWriter(folder, max_shard_bytes=shard_bytes(section.max_shard_gb))
    names = stored_names(loaded.source, loaded.model)
    for name, tensor in _original_tensors(loaded, dtype) if original else _fused_tensors(loaded, dtype):
        writer.add(names.get(name, name), to_dtype(name, tensor, dtype))
    writer.close()
    write_hf_files(
        loaded,
        folder,
        config=loaded.source.config if original else loaded.model.config,
        dtype=dtype,
        tied=loaded.tied if original else is_tied(loaded.model),
    )
    rounded = original and loaded.fusion is not None
    return Written(
        dtype=dtype,
        bound=_bound(rounded, dtype, live_dtype),
        exported_weight=None if rounded or _is_live(loaded, dtype) else lambda _, layer: merged_weight(layer, dtype),
        basis=section.basis if loaded.fusion is not None else "original",
        notes=_notes(loaded, dtype, rounded),
    )


def _bound(rounded: bool, dtype: torch.dtype, live_dtype: torch.dtype) -> Bound:
    # Unrotated, even fp32 holds the checkpoint's own embedding where the run has it rotated and rounded to 16 bits.
    return FLOOR_16BIT if rounded and not dtype == live_dtype == torch.float32 else EXACT


def _is_live(loaded: LoadedModel, dtype: torch.dtype) -> bool:
    """Return whether the live forward uses exactly the exported weights."""
    layers = linear_layers(loaded.model).values()
    return dtype in (model_dtype(loaded), torch.float32) and all(is_exact(layer, dtype) for layer in layers)


def _notes(loaded: LoadedModel, dtype: torch.dtype, rounded: bool) -> tuple[str, ...]:
    quantized = any(
        isinstance(m, AdaptedLinear) and m.quantizer is not None for m in linear_layers(loaded.model).values()
    )
    if rounded and quantized:
        return (f"the original basis leaves the grid that was trained on; its weights are rounded to {dtype} instead",)
    return ()


def _fused_tensors(loaded: LoadedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, part in model_parts(loaded.model):
        if isinstance(part, Tensor):
            yield name, part
            continue
        yield f"{name}.weight", merged_weight(part, dtype)
        if part.bias is not None:
            yield f"{name}.bias", part.bias


def _original_tensors(loaded: LoadedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    head = _name_of_head(loaded)
    for name, part in model_parts(loaded.model):
        if isinstance(part, Tensor):
            if not (loaded.tied and name == head):
                yield name, loaded.originals[name]
            continue
        weight = f"{name}.weight"
        original = _original_weight(loaded, weight, part, dtype)
        yield weight, original
        if part.bias is not None:
            yield f"{name}.bias", _original_bias(loaded, name, part, original)


def _original_weight(loaded: LoadedModel, name: str, layer: Linear, dtype: torch.dtype) -> Tensor:
    if isinstance(layer, DenseBase):
        return loaded.originals[name]
    if loaded.fusion is None:
        return merged_weight(layer, dtype)
    # Unrotated from the values that the forward uses, so that the result is rounded once.
    return loaded.fusion.inverse(name, merged_weight(layer, torch.float32), loaded.originals)


def _original_bias(loaded: LoadedModel, name: str, layer: Linear, weight: Tensor) -> Tensor:
    original = loaded.originals[f"{name}.bias"]
    if isinstance(layer, DenseBase) or loaded.fusion is None or not loaded.fusion.moves_shift(name):
        return original
    # The fused bias holds the untrained weight times the bias of a LayerNorm; here that is up to the trained weight.
    fused = loaded.fusion.forward(f"{name}.bias", original, loaded.originals)
    norms = {norm: loaded.originals[norm] for norm in loaded.fusion.norm_names}
    return loaded.fusion.inverse(f"{name}.bias", fused, {**norms, f"{name}.weight": weight})


def _name_of_head(loaded: LoadedModel) -> str:
    head = loaded.model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in loaded.model.named_modules() if module is head), "")
