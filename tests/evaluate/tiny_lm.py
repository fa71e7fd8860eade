"""A random Llama and items to score it on."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(dtype: torch.dtype = torch.float32, *, tied: bool = False, vocabulary: int = 96) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype).eval()


@dataclass(frozen=True)
class Choice:
    prompt_ids: tuple[int, ...]
    option_ids: tuple[tuple[int, ...], ...]
    label: int


@dataclass(frozen=True)
class Task:
    prompt_ids: tuple[int, ...]
    reference: str


class LetterTokenizer:
    """Token i is the character with code 32 + i."""

    eos_token_id = 95

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(32 + i) for i in ids)

    def __call__(self, text: str) -> object:
        return SimpleNamespace(input_ids=[ord(c) - 32 for c in text])
