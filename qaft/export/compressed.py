"""``compressed-tensors``: W4A16, W8A16, W8A8, W4A8 and W4A4 integers for vLLM and transformers.

Codes, scales and zero points are the trained ones, copied and never derived again:

    weight_packed       int32 [O, ceil(I bits / 32)]        weight_scale   [O, G]         weight_shape   int64 [2]
    weight_zero_point   int32 [ceil(O bits / 32), G]        asymmetric grids only
    weight              int8 [O, I]                         W8A8 per channel: in place of weight_packed, weight_shape

Layers that are dense in the run stay dense. How inputs are quantized is in the configuration alone, for exactly those
layers whose inputs were quantized in training. With ``profile: vllm`` so is R4, which transformers would leave out.
Source of the layout: compressed-tensors 0.20, ``pack-quantized`` and ``int-quantized``.

Shapes: O = out_features, I = in_features, G = groups along I.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qaft.errors import ExportError
from qaft.export.base import EXACT, FLIPPING, ExportInfo, ExportReport, Linear, Written
from qaft.export.checkpoint_writer import CheckpointWriter, shard_bytes, to_dtype
from qaft.export.hf_files import write_hf_files
from qaft.export.packed import Packing, plan_packing
from qaft.export.packed_rows import stored_codes
from qaft.export.publish import publish
from qaft.export.quantization_config import PackedGrid, quantization_config
from qaft.export.survival import Survival, require_survival, survival_notes
from qaft.export.tensors import (
    dense_linears,
    is_tied,
    linear_layers,
    merged_weight,
    model_dtype,
    model_parts,
    require_plain_options,
)
from qaft.export.transform_config import online_rotation, transform_config
from qaft.layers.adapted import AdaptedLinear
from qaft.quant.base import QTensor

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel
    from qaft.sections import ExportSection

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM joins into one, which has one grid."""


def export_compressed(loaded: LoadedModel, section: ExportSection, folder: Path, info: ExportInfo) -> ExportReport:
    """4- or 8-bit integers in the compressed-tensors format, with quantized inputs or 16-bit ones, for vLLM and others.

    Raises:
        ExportError: see ``Exporter``; or a grid cannot be packed, nothing is on one, the update would not survive, or
            the profile cannot hold an online rotation.
        DifferenceError: the reload differs by more than its bound.
    """
    require_plain_options(section)
    layers = linear_layers(loaded.model)
    _require_servable(layers, section.profile)
    plan = plan_packing(loaded, layers, force=section.force)
    rows = plan.survival()
    require_survival(rows, force=section.force)
    return publish(loaded, section, folder, info, write=partial(_write, loaded, section, plan, rows))


def _require_servable(layers: dict[str, Linear], profile: str) -> None:
    """Refuse layers whose function is more than weights, quantized inputs and, in the profile vllm, R4."""
    for name, layer in layers.items():
        inner = (layer.rotation, layer.act_quantizer) if isinstance(layer, AdaptedLinear) else ()
        if any(not isinstance(part, nn.Identity) for part in inner):
            raise ExportError(f"{name}: rotates or quantizes its input by itself; put that in with put_online")
        if profile == "portable" and online_rotation(layer) is not None:
            raise ExportError(
                f"{name}: has an online rotation, which transformers would not apply; set export.profile to vllm, or "
                "train with qat.target portable"
            )


def _write(loaded: LoadedModel, section: ExportSection, plan: Packing, rows: list[Survival], folder: Path) -> Written:
    dtype = model_dtype(loaded)
    writer = CheckpointWriter(folder, max_shard_bytes=shard_bytes(section.max_shard_gb))
    for name, part in model_parts(loaded.model):
        if isinstance(part, Tensor):
            writer.add(name, to_dtype(name, part, dtype))
            continue
        if name in plan.codes:
            _add_codes(writer, name, plan.codes[name](), plan.grids[name])
        else:
            writer.add(f"{name}.weight", to_dtype(name, merged_weight(part, dtype), dtype))
        if part.bias is not None:
            writer.add(f"{name}.bias", to_dtype(name, part.bias, dtype))
    writer.close()
    transforms = transform_config(plan.layers)
    dense = dense_linears(loaded.model, plan.codes)
    write_hf_files(
        loaded,
        folder,
        config=loaded.model.config,
        dtype=dtype,
        tied=is_tied(loaded.model),
        quantization=quantization_config(plan.grids, dense, transforms=transforms),
    )
    return Written(
        dtype=dtype,
        bound=EXACT if plan.inputs is None else FLIPPING,
        exported_weight=None if plan.is_live(dtype) else partial(plan.weight, dtype),
        basis="original" if loaded.fusion is None else "fused",
        grids=tuple(grid.describe() for grid in dict.fromkeys(plan.grids.values())),
        inputs=plan.inputs,
        vllm_only=transforms is not None,
        notes=(*_notes(plan, rows), *_serving(plan, section.profile, transforms)),
    )


def _add_codes(writer: CheckpointWriter, name: str, codes: QTensor, grid: PackedGrid) -> None:
    to_dtype(f"{name}.weight_scale", codes.scale, codes.scale.dtype)
    for part, tensor in stored_codes(codes, grid.bits, packed=grid.packed).items():
        writer.add(f"{name}.{part}", tensor)


def _notes(plan: Packing, rows: list[Survival]) -> tuple[str, ...]:
    notes = []
    if any(not grid.symmetric for grid in plan.grids.values()):
        notes.append(
            "transformers unpacks asymmetric weights while it loads: there the model takes the memory of 16 bits"
        )
    notes.extend(survival_notes(rows))
    for joined in _FUSED:
        by_parent: dict[str, set[PackedGrid | None]] = {}
        parents = {name.rpartition(".")[0] for name in plan.grids if name.rpartition(".")[2] in joined}
        for parent in parents:
            by_parent[parent] = {plan.grids.get(f"{parent}.{leaf}") for leaf in joined}
        if any(len(grids) > 1 for grids in by_parent.values()):
            notes.append(f"{', '.join(joined)} are on different grids: transformers loads that, vLLM needs them on one")
    return tuple(notes)


def _serving(plan: Packing, profile: str, transforms: dict[str, Any] | None) -> tuple[str, ...]:
    """Return how the folder has to be served for inputs and rotations to be those of training."""
    notes = []
    packed = sorted({grid.scheme for grid in plan.grids.values() if grid.inputs is not None and grid.packed})
    if packed:
        notes.append(
            f"{', '.join(packed)}: serve it with `vllm serve ... --linear-backend humming` (0.33): by itself vLLM "
            "chooses a kernel by the weights, Machete or Marlin, which leaves inputs in 16 bits"
        )
        if any(grid.scheme == "W4A8" and grid.group_size is not None for grid in plan.grids.values()):
            notes.append("vLLM before 0.31 takes W4A8 in groups for fp8 inputs on GPUs of compute capability 9.0")
    if plan.inputs == "compressed-tensors":
        notes.append(
            "inputs are rounded as transformers with compressed-tensors does it; kernels of vLLM divide by another "
            "scale, under which a tenth of the codes differ: train with qat.activations.function vllm for it"
        )
    if transforms is not None:
        notes.append(
            "R4 is in transform_config: serve it with vLLM, without tensor parallelism. transformers ignores "
            "transform_config and computes something else, without an error; qaft applies it"
        )
    elif profile == "vllm":
        notes.append("profile vllm: no layer of this run has R4, so nothing was written that transformers cannot run")
    return tuple(notes)
