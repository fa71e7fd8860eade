"""``peft``: an update of bounded rank as a plain LoRA adapter on the original base model.

    dW = up @ down,   down -> lora_A [R, I],  up -> lora_B [O, R],   lora_alpha / r = 1 in every layer

A run in a fused basis is turned back to the original one, and a dense update is cut to the rank that the export section
names; see ``lora_factors.py``.

Shapes: O = out_features, I = in_features, R = rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from qaft.bases.dense import DenseBase
from qaft.errors import ExportError
from qaft.export.base import EXACT, FLOOR_16BIT, UNBOUNDED, Bound, ExportInfo, ExportReport, Linear, Written
from qaft.export.checkpoint_writer import to_dtype
from qaft.export.hf_files import write_json, write_tokenizer
from qaft.export.lora_factors import Adapter, adapter_of
from qaft.export.publish import publish
from qaft.export.tensors import linear_layers, model_dtype, require_plain_options, require_portable
from qaft.export.truncation import energy_note, energy_table
from qaft.layers.adapted import AdaptedLinear
from qaft.tensor_file import save_tensors
from qaft.updates.dense import DenseDelta

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel
    from qaft.sections import ExportSection


def export_peft(loaded: LoadedModel, section: ExportSection, folder: Path, info: ExportInfo) -> ExportReport:
    """A LoRA adapter (adapter_model.safetensors) for PEFT, vLLM and llama.cpp, on the original base model.

    Raises:
        ExportError: see ``Exporter``; or an update has no bounded rank, and the section names none to cut it to.
        DifferenceError: the reload differs by more than its bound.
    """
    require_plain_options(section)
    require_portable(linear_layers(loaded.model))
    adapted = {n: m for n, m in linear_layers(loaded.model).items() if isinstance(m, AdaptedLinear)}
    if not adapted:
        raise ExportError("peft: the run adapts no layer, so there is no adapter to write")
    for name, layer in adapted.items():
        _require_rank(name, layer, section.rank)
    adapters = {name: adapter_of(name, layer, loaded, section.rank) for name, layer in adapted.items()}
    kept = {name: adapter.kept for name, adapter in adapters.items() if adapter.kept is not None}
    if kept:
        Console(stderr=True).print(energy_table(kept))
    return publish(loaded, section, folder, info, write=partial(_write, loaded, adapted, adapters, info))


def _require_rank(name: str, layer: AdaptedLinear, rank: int | None) -> None:
    if layer.update.has_low_rank():
        if rank is not None:
            raise ExportError(
                f"{name}: its update has a rank of its own, which export.rank={rank} would cut; leave it out"
            )
        return
    if not isinstance(layer.update, DenseDelta):
        raise ExportError(
            f"{name}: update {type(layer.update).__name__} is not of bounded rank, which a LoRA file needs; export "
            "`merged` or `compressed-tensors`, or train with update.kind lowrank, linchain, roco or bank"
        )
    limit = min(layer.out_features, layer.in_features)
    if rank is None or rank > limit:
        raise ExportError(
            f"{name}: a dense update is not of bounded rank: a LoRA file holds the part of it that export.rank names, "
            f"in [1, {limit}] for this layer, not {rank}; or export `merged` or `compressed-tensors`"
        )


def _write(
    loaded: LoadedModel,
    adapted: dict[str, AdaptedLinear],
    adapters: dict[str, Adapter],
    info: ExportInfo,
    folder: Path,
) -> Written:
    tensors: dict[str, Tensor] = {}
    biased = any(adapter.bias is not None for adapter in adapters.values())
    for name, adapter in adapters.items():
        prefix, up = f"base_model.model.{name}", adapter.factors.up
        tensors[f"{prefix}.lora_A.weight"] = to_dtype(name, adapter.factors.down, torch.float32).cpu().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = to_dtype(name, up, torch.float32).cpu().contiguous()
        if biased:
            # One switch of the file for all layers.
            bias = adapter.bias if adapter.bias is not None else up.new_zeros(len(up))
            tensors[f"{prefix}.lora_B.bias"] = to_dtype(name, bias, torch.float32).cpu()
    save_tensors(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    ranks = {name: adapter.factors.down.shape[0] for name, adapter in adapters.items()}
    write_json(folder / "adapter_config.json", adapter_config(ranks, info.base, biased=biased))
    write_tokenizer(loaded, folder)
    bound, notes = _promise(loaded, adapted)
    kept = {name: adapter.kept for name, adapter in adapters.items() if adapter.kept is not None}
    exported: Callable[[str, Linear], Tensor] | None = None
    if kept:
        notes = (*notes, energy_note(kept))
        # What the file holds is compared in the basis of the run; in another one only the whole update is known.
        exported, bound = (partial(_adapted_weight, adapters), bound) if loaded.fusion is None else (None, UNBOUNDED)
    if biased:
        notes = (*notes, "lora_bias is set: PEFT and transformers load that, vLLM and llama.cpp do not")
    return Written(
        dtype=torch.float32,
        bound=bound,
        exported_weight=None if bound is UNBOUNDED else exported,
        basis="original",
        base=loaded.source.folder,
        notes=notes,
    )


def _adapted_weight(adapters: dict[str, Adapter], name: str, layer: Linear) -> Tensor:
    """Return the weight of base and adapter of an unrotated run with dense bases, fp32 [O, I]."""
    if not isinstance(layer, AdaptedLinear):
        return layer.dequantize().float()
    factors = adapters[name].factors
    return layer.base.dequantize().float() + factors.up @ factors.down


def adapter_config(ranks: dict[str, int], base: str, *, biased: bool = False) -> dict[str, Any]:
    """Return adapter_config.json for adapters of these ranks by module path, each with lora_alpha / r = 1.

    Args:
        ranks: module path -> rank.
        base: id or folder of the base model.
        biased: whether lora_B has a bias, in every layer.
    """
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: r for name, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        # Full paths: a short name would also put empty adapters into layers that were not selected.
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": biased,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _promise(loaded: LoadedModel, adapted: dict[str, AdaptedLinear]) -> tuple[Bound, tuple[str, ...]]:
    """Return what a reload on the base model must equal, and what the user has to know."""
    if any(layer.quantizer is not None for layer in adapted.values()):
        return UNBOUNDED, (
            "this run was trained through a quantizer: the trained model is the `merged` or `compressed-tensors` "
            "export; base plus adapter is what it was before rounding",
        )
    layers = linear_layers(loaded.model).values()
    bases = [layer.base if isinstance(layer, AdaptedLinear) else layer for layer in layers]
    if any(not isinstance(base, DenseBase) for base in bases):
        return UNBOUNDED, (
            "the adapter was trained on a quantized base: on the original base its output differs by that rounding",
        )
    if loaded.fusion is not None and model_dtype(loaded) != torch.float32:
        return FLOOR_16BIT, ()
    return EXACT, ()
