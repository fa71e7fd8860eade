"""The course of exports that pack linear layers one by one: what is on the format's grid is copied as it is.

    trained through a grid   its codes and scales         adapter on a packed base   put onto the grid, with force where
    packed and frozen        its codes and scales                                    the update does not survive that
    dense                    16 bits

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qaft.bases.dense import DenseBase
from qaft.errors import ExportError
from qaft.export.base import EXACT, Bound, ExportInfo, ExportReport, Linear, Written
from qaft.export.checkpoint_writer import CheckpointWriter, shard_bytes, to_dtype
from qaft.export.hf_files import write_hf_files
from qaft.export.publish import publish
from qaft.export.survival import layer_survival, require_survival, survival_notes
from qaft.export.tensors import (
    dense_linears,
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
from qaft.quant.base import Quantizer

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel
    from qaft.sections import ExportSection

HELD = Bound(max_relative=EXACT.max_relative, reason="the weights that the file holds, fp32 sums in another order")
"""Measured 0. What the kernels of a client make of these weights in 16 bits is its own matter: noted, not bounded."""


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """One layer as a file holds it.

    Attributes:
        grid: the grid as plain values, for the stamp and the card.
        tensors: returns what is stored, by what follows the module path in its name.
        weight: returns what a reader multiplies with, fp32 [O, I]; None: what the run multiplies with, bit for bit.
        requantized: the grid that a layer is put onto which was not trained on it, or None.
    """

    grid: Mapping[str, Any]
    tensors: Callable[[], Mapping[str, Tensor]]
    weight: Callable[[], Tensor] | None = None
    requantized: Quantizer | None = None


@dataclass(frozen=True, kw_only=True)
class PackedFormat:
    """A format.

    Attributes:
        pack: returns how a layer is stored that is on a grid or in packed storage; raises ExportError where it cannot.
        config: returns the section ``quantization_config`` for the packed layers and the names of the dense ones.
        notes: returns what the user has to know of these packed layers.
        empty: what to do when no layer is packed.
        files: writes what the format wants beside the checkpoint into the folder, given that section; None: nothing.
    """

    pack: Callable[[str, Linear], PackedLayer]
    config: Callable[[Mapping[str, PackedLayer], list[str]], Mapping[str, Any]]
    notes: Callable[[Mapping[str, PackedLayer]], tuple[str, ...]]
    empty: str
    files: Callable[[Path, Mapping[str, Any]], None] | None = None


@dataclass(frozen=True)
class _Plan:
    format: PackedFormat
    packed: dict[str, PackedLayer]
    config: Mapping[str, Any]
    notes: tuple[str, ...]


def export_packed(
    loaded: LoadedModel, section: ExportSection, folder: Path, info: ExportInfo, format: PackedFormat
) -> ExportReport:
    """Write a model in a packed format.

    Raises:
        ExportError: see ``Exporter``; or no layer is packed, or the update would not survive.
        DifferenceError: the reload differs by more than its bound.
    """
    require_plain_options(section)
    layers = linear_layers(loaded.model)
    require_portable(layers)
    packed = {name: format.pack(name, layer) for name, layer in layers.items() if not _stays_dense(layer)}
    if not packed:
        raise ExportError(f"{section.format}: no layer of this run is on a grid, so nothing is packed; {format.empty}")
    config = format.config(packed, dense_linears(loaded.model, packed))
    rows = [
        layer_survival(name, layers[name], layer.requantized)
        for name, layer in packed.items()
        if layer.requantized is not None
    ]
    require_survival(rows, force=section.force)
    plan = _Plan(format, packed, config, (*format.notes(packed), *survival_notes(rows)))
    return publish(loaded, section, folder, info, write=partial(_write, loaded, section, plan))


def _stays_dense(layer: Linear) -> bool:
    """Return whether a layer is in 16 bits in the run and computes with no grid, so that it stays as it is."""
    if isinstance(layer, AdaptedLinear):
        return layer.quantizer is None and isinstance(layer.base, DenseBase)
    return isinstance(layer, DenseBase)


def _write(loaded: LoadedModel, section: ExportSection, plan: _Plan, folder: Path) -> Written:
    dtype = model_dtype(loaded)
    writer = CheckpointWriter(folder, max_shard_bytes=shard_bytes(section.max_shard_gb))
    for name, part in model_parts(loaded.model):
        if isinstance(part, Tensor):
            writer.add(name, to_dtype(name, part, dtype))
            continue
        stored = plan.packed[name].tensors() if name in plan.packed else {"weight": merged_weight(part, dtype)}
        for leaf, tensor in stored.items():
            writer.add(f"{name}.{leaf}", to_dtype(f"{name}.{leaf}", tensor, tensor.dtype))
        if part.bias is not None:
            writer.add(f"{name}.bias", to_dtype(name, part.bias, dtype))
    writer.close()
    write_hf_files(
        loaded,
        folder,
        config=loaded.model.config,
        dtype=dtype,
        tied=is_tied(loaded.model),
        quantization=plan.config,
    )
    if plan.format.files is not None:
        plan.format.files(folder, plan.config)
    grids = {tuple(layer.grid.items()): layer.grid for layer in plan.packed.values()}
    return Written(
        dtype=dtype,
        bound=HELD,
        exported_weight=None if _is_live(loaded, plan, dtype) else partial(_exported_weight, plan, dtype),
        basis="original" if loaded.fusion is None else "fused",
        grids=tuple(grids.values()),
        notes=plan.notes,
    )


def _is_live(loaded: LoadedModel, plan: _Plan, dtype: torch.dtype) -> bool:
    """Return whether the live forward uses exactly the weights of the file."""
    layers = linear_layers(loaded.model)
    dense = (is_exact(layer, dtype) for name, layer in layers.items() if name not in plan.packed)
    return all(layer.weight is None for layer in plan.packed.values()) and all(dense)


def _exported_weight(plan: _Plan, dtype: torch.dtype, name: str, layer: Linear) -> Tensor:
    packed = plan.packed.get(name)
    return merged_weight(layer, dtype) if packed is None or packed.weight is None else packed.weight()
