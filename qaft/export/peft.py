"""``peft``: an update of bounded rank as a plain LoRA adapter on the original base model.

    dW = up @ down,   down -> lora_A [R, I],  up -> lora_B [O, R],   lora_alpha / r = 1 in every layer

A run in a fused basis (W' = R_out^T W diag(gamma) R_in) is turned back on the factors, with the rank unchanged:

    dW = R_out dW' R_in^T diag(1 / gamma)    =>    lora_B = R_out up,   lora_A = down R_in^T diag(1 / gamma)

Shapes: O = out_features, I = in_features, R = rank.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qaft.bases.dense import DenseBase
from qaft.errors import ExportError
from qaft.export.base import EXACT, FLOOR_16BIT, UNBOUNDED, Bound, ExportInfo, ExportReport, Written
from qaft.export.checkpoint_writer import to_dtype
from qaft.export.hf_files import write_json, write_tokenizer
from qaft.export.publish import publish
from qaft.export.tensors import linear_layers, model_dtype, require_plain_options, require_portable
from qaft.layers.adapted import AdaptedLinear
from qaft.rotation.place import Place
from qaft.tensor_file import save_tensors
from qaft.updates.base import LowRankFactors

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel
    from qaft.sections import ExportSection


def export_peft(loaded: LoadedModel, section: ExportSection, folder: Path, info: ExportInfo) -> ExportReport:
    """A LoRA adapter (adapter_model.safetensors) for PEFT, vLLM and llama.cpp, on the original base model.

    Raises:
        ExportError: see ``Exporter``; or an update has no bounded rank.
        DifferenceError: the reload differs by more than its bound.
    """
    require_plain_options(section)
    require_portable(linear_layers(loaded.model))
    adapted = {n: m for n, m in linear_layers(loaded.model).items() if isinstance(m, AdaptedLinear)}
    if not adapted:
        raise ExportError("peft: the run adapts no layer, so there is no adapter to write")
    for name, layer in adapted.items():
        if layer.update.low_rank_factors() is None:
            raise ExportError(
                f"{name}: update {type(layer.update).__name__} is not of bounded rank, which a LoRA file needs; export "
                "`merged` or `compressed-tensors`, or train with update.kind lowrank, linchain, roco or bank"
            )
        if loaded.fusion is not None and loaded.fusion.moves_shift(name):
            raise ExportError(
                f"{name}: its bias holds what the bias of a LayerNorm contributes, which changes with the update, and "
                "a LoRA file holds no bias; export `merged` or `compressed-tensors`, or train with qat.rotation none"
            )
    return publish(loaded, section, folder, info, write=partial(_write, loaded, adapted, info))


def _write(loaded: LoadedModel, adapted: dict[str, AdaptedLinear], info: ExportInfo, folder: Path) -> Written:
    places = {} if loaded.fusion is None else loaded.fusion.places
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in adapted.items():
        factors = layer.update.low_rank_factors()
        assert factors is not None
        if name in places:
            factors = restored(factors, places[name], loaded)
        ranks[name] = factors.down.shape[0]
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = to_dtype(name, factors.down, torch.float32).cpu().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = to_dtype(name, factors.up, torch.float32).cpu().contiguous()
    save_tensors(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", adapter_config(ranks, info.base))
    write_tokenizer(loaded, folder)
    bound, notes = _promise(loaded, adapted)
    return Written(dtype=torch.float32, bound=bound, basis="original", base=loaded.source.folder, notes=notes)


@torch.no_grad()
def restored(factors: LowRankFactors, place: Place, loaded: LoadedModel) -> LowRankFactors:
    """Return the factors of the same update in the original basis, fp32, computed in fp64.

    Raises:
        ExportError: a norm weight holds zeros, so that the update cannot be undone there.
    """
    down, up = factors.down.double(), factors.up.double()
    if place.reads is not None:
        down = place.reads.undo(down)
    assert loaded.fusion is not None
    gamma = loaded.fusion.gamma(place, loaded.originals)
    if gamma is not None:
        if not bool(gamma.all()):
            raise ExportError(f"{place.norm} holds zeros: its readers cannot be brought back to the original basis")
        down = down / gamma.to(down.device)
    if place.writes is not None:
        up = place.writes.undo(up, dim=0)
    return LowRankFactors(down=down.float(), up=up.float())


def adapter_config(ranks: dict[str, int], base: str) -> dict[str, Any]:
    """Return adapter_config.json for adapters of these ranks by module path, each with lora_alpha / r = 1."""
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
