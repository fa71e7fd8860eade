"""A LoRA folder of PEFT (``adapter_config.json``, ``adapter_model.safetensors``), read without PEFT.

    dW = s B A,   s = alpha / r,  or alpha / sqrt(r) with use_rslora (arXiv 2312.03732)

What the file means beyond that (magnitudes, biases, trained embeddings, a changed base) is refused by name: a setting
that is skipped would be another model. Dropout is PEFT's during training only and is not part of the adapter.

Shapes: O = out_features, I = in_features, R = rank.  A [R, I], B [O, R].
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qaft.errors import ModelError
from qaft.updates.base import LowRankFactors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_WAY_OUT = (
    "merge it into its 16-bit base with PEFT's merge_and_unload, save the result, and give that as the base model "
    "without an adapter"
)
_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")

_USED = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "base_model_name_or_path"}
# fan_in_fan_out is for layers that store [I, O]; PEFT resets it for linear layers, and others are refused as targets.
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
}
_CHECKED = {"bias", "init_lora_weights"}
_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Starts of the factors that leave the base model as it is."""


@dataclass(frozen=True)
class LoraLayer:
    """One layer of an adapter: the scaling s and the rank R."""

    scale: float
    rank: int


@dataclass(frozen=True)
class LoraFolder:
    """An adapter whose factors are read when they are asked for.

    Attributes:
        path: the folder.
        base: what the adapter says that it was trained on, or None.
        layers: module path -> scaling and rank, sorted by path.
    """

    path: Path
    base: str | None
    layers: Mapping[str, LoraLayer]

    def factors(self, name: str) -> LowRankFactors:
        """Return ``(A, s B)`` of a layer, fp32."""
        prefix = f"base_model.model.{name}"
        with safe_open(self.path / WEIGHTS, framework="pt") as file:
            down, up = (file.get_tensor(f"{prefix}.lora_{side}.weight").float() for side in "AB")
        return LowRankFactors(down=down, up=self.layers[name].scale * up)


def open_adapter(folder: str | Path) -> LoraFolder:
    """Return the adapter in a folder that PEFT has saved.

    Raises:
        ModelError: a file is missing or broken, or the adapter is more than two factors for each of some layers.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _require_plain_lora(folder, config)
    ranks = _read_ranks(folder)
    layers = {name: _layer(folder, config, name, rank) for name, rank in sorted(ranks.items())}
    return LoraFolder(path=folder, base=config.get("base_model_name_or_path"), layers=layers)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder}: no {CONFIG}; give the folder that PEFT's save_pretrained has written")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; save the adapter again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds {type(config).__name__}, not settings by name; save the adapter again")
    return config


def _require_plain_lora(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder}: peft_type={config.get('peft_type')!r}, but only LORA is read; {_WAY_OUT}")
    init = config.get("init_lora_weights", True)
    if init not in _STARTS:
        raise ModelError(
            f"{folder}: init_lora_weights={init!r} has changed the base model too; save it again with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    if config.get("bias", "none") != "none":
        raise ModelError(f"{folder}: bias={config['bias']!r}: it holds trained biases of the base; {_WAY_OUT}")
    for key in sorted(config.keys() - _USED - _WITHOUT_EFFECT - _CHECKED):
        if config[key]:
            raise ModelError(f"{folder}: {key}={config[key]!r} makes it more than a plain LoRA; {_WAY_OUT}")


def _read_ranks(folder: Path) -> dict[str, int]:
    """Return module path -> R, by the shapes of the stored factors."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelError(
            f"{folder}: no {WEIGHTS}; a pickled adapter_model.bin is not read: load it with PEFT and call "
            "save_pretrained, which writes safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise ModelError(f"{path}: cannot be read: {error}; save the adapter again") from error
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = _TENSOR.fullmatch(name)
        if match is None or len(shape) != 2:
            raise ModelError(f"{path}: {name} {list(shape)} is no factor of a linear layer; {_WAY_OUT}")
        sides.setdefault(match["layer"], {})[match["side"]] = shape
    if not sides:
        raise ModelError(f"{path}: holds no layer; train the adapter, or leave it out")
    for layer, found in sides.items():
        if set(found) != {"A", "B"} or found["A"][0] != found["B"][1]:
            raise ModelError(f"{path}: lora_A and lora_B of {layer} do not fit each other: {found}; save it again")
    return {layer: found["A"][0] for layer, found in sides.items()}


def _layer(folder: Path, config: Mapping[str, Any], name: str, rank: int) -> LoraLayer:
    said, alpha = (
        _of_layer(config.get(pattern) or {}, name, config.get(key))
        for pattern, key in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    if said != rank or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha == 0:
        raise ModelError(
            f"{folder}: {name} has factors of rank {rank}, and {CONFIG} says rank {said!r} and alpha {alpha!r}; "
            "give the configuration that the adapter was trained with"
        )
    return LoraLayer(scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank=rank)


def _of_layer(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that is a whole tail of the module path, as PEFT matches it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)
