"""A byte-level tokenizer with a ChatML template, and samples made of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qaft.data.files import Provenance
from qaft.data.samples import Sample

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML, *, bos: bool = False, eos: str | None = "<|im_end|>") -> Any:
    """One token per byte, the merges ' g' and two line feeds, and the special tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    merges = [("Ġ", "g"), ("Ċ", "Ċ")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    if bos:
        begin = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    named = {"bos_token": "<s>"} if bos else {}
    named |= {"eos_token": eos} if eos else {}
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
    result.chat_template = template
    return result


@pytest.fixture(scope="session")
def chatml() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def plain() -> Any:
    return byte_tokenizer(None, bos=True)


@pytest.fixture
def make_tokenizer() -> Callable[..., Any]:
    return byte_tokenizer


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines and returns the file."""

    def write(rows: Sequence[dict[str, Any]], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def numbered_samples() -> Callable[[Sequence[int]], list[Sample]]:
    """Samples of the given lengths whose tokens name them: 100 * index + position, all trained."""

    def make(lengths: Sequence[int]) -> list[Sample]:
        return [
            Sample(ids := np.arange(n, dtype=np.int32) + 100 * i, ids, Provenance("numbered", i + 1))
            for i, n in enumerate(lengths)
        ]

    return make
