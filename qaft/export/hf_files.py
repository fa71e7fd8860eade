"""Everything in a transformers folder but the weights: configuration, generation settings, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qaft.models.load import LoadedModel

GENERATION_CONFIG = "generation_config.json"


def write_hf_files(
    loaded: LoadedModel,
    folder: Path,
    *,
    config: PretrainedConfig,
    dtype: torch.dtype,
    tied: bool,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json, generation_config.json and the tokenizer's files.

    Args:
        loaded: the model.
        folder: an existing folder.
        config: the configuration to start from.
        dtype: dtype of the weights.
        tied: whether the file holds one tensor for embedding and head.
        quantization: the section ``quantization_config``; None for plain weights.
    """
    values = config.to_diff_dict()
    values.pop("quantization_config", None)
    values |= {
        "architectures": [type(loaded.model).__name__],
        "dtype": str(dtype).removeprefix("torch."),
        # Always written: the defaults of families differ, and a wrong guess replaces the head by the embedding.
        "tie_word_embeddings": tied,
    }
    if quantization is not None:
        values["quantization_config"] = dict(quantization)
    write_json(folder / "config.json", values)
    write_tokenizer(loaded, folder)
    source = loaded.source.folder / GENERATION_CONFIG
    if source.is_file():
        # Copied, not saved: saving validates, and published settings often contradict themselves.
        shutil.copyfile(source, folder / GENERATION_CONFIG)
    elif loaded.model.generation_config is not None:
        loaded.model.generation_config.to_json_file(folder / GENERATION_CONFIG)


def write_tokenizer(loaded: LoadedModel, folder: Path) -> None:
    """Write the tokenizer's files and its chat template."""
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write readable JSON with sorted keys."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
