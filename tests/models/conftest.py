"""Tiny random checkpoints of every known family, written as users find them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

WriteCheckpoint = Callable[..., Path]


def tiny_model(family: str = "llama", *, seed: int = 0, **options: Any) -> Any:
    """Return a random fp32 model whose norms and biases are not trivial."""
    head = {"head_dim": 16} if family == "qwen3" else {}
    config = AutoConfig.for_model(family, **{**SIZES, **head, **options})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.3)
            else:
                parameter.normal_(0.0, 0.15)
    return model


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(60)} | {"<unk>": 60}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[[Path], None]:
    """Write a tokenizer of one word per id into a folder."""
    return _write_tokenizer


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> WriteCheckpoint:
    """Write ``tiny_model(**options)`` with its tokenizer; ``shard_size`` cuts it into several files."""

    def write(family: str = "llama", *, shard_size: str = "1GB", **options: Any) -> Path:
        folder = tmp_path / "checkpoint"
        tiny_model(family, **options).save_pretrained(folder, max_shard_size=shard_size)
        _write_tokenizer(folder)
        return folder

    return write


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two rows of 20 ids below 60."""
    return torch.randint(0, 60, (2, 20), generator=torch.Generator().manual_seed(0))
