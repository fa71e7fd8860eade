"""Tiny models of the families that GGUF files are written for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_checkpoint import write_checkpoint

from qaft.models.load import LoadedModel, load_model
from qaft.sections import GridSection, ModelSection, QatSection

GEMMA: dict[str, Any] = {"tied": True, "head_dim": 16, "query_pre_attn_scalar": 16}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> family, options of its config, whether it can be rotated
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "gemma2": ("gemma2", GEMMA, False),
    "gemma3_text": ("gemma3_text", GEMMA, False),
    "llama": ("llama", {}, True),
    "llama, tied": ("llama", {"tied": True}, False),
    "llama, tied before it was rotated": ("llama", {"tied": True}, True),
    "llama, scaled positions": ("llama", {"rope_parameters": SCALED}, False),
    "mistral": ("mistral", {}, False),
    "phi3": ("phi3", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, False),
    "qwen2": ("qwen2", {}, True),
    # transformers does not read the head_dim of this family from the file.
    "qwen3": ("qwen3", {"head_dim": 128}, False),
}


def gguf_grid(kind: str, *, rotation: str = "none", **options: Any) -> QatSection:
    return QatSection(weights=GridSection.model_validate({"kind": kind, **options}), rotation=rotation)


def packed_model(name: str, folder: Path, *, storage: str = "int4") -> LoadedModel:
    """A model whose linear layers all lie on the block format of that width."""
    family, options, rotated = MODELS[name]
    checkpoint = write_checkpoint(folder, family=family, dtype=torch.bfloat16, **options)
    return load_model(
        ModelSection.model_validate({"name": str(checkpoint), "storage": storage, "attention": "eager"}),
        qat=gguf_grid("q4_0", rotation="hadamard" if rotated else "none"),
    )
