"""Greedy generation in batches, and exact match of what is generated.

Greedy means the most likely token at every step: penalties and temperatures of a checkpoint's generation config, which
would make two exports of one model answer differently, are not applied.

Shapes: B = prompts in a batch, T = longest prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qaft.errors import DataError
from qaft.evaluate.unpacked import unpacked
from qaft.layers.mode import evaluating


class GenerationItem(Protocol):
    """A prompt and the text that should follow it."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """Token ids of the prompt, at least one."""
        ...

    @property
    def reference(self) -> str:
        """The expected text; surrounding white space does not count."""
        ...


@dataclass(frozen=True)
class ExactMatch:
    """``predictions``: the generated text of each item, in order."""

    correct: int
    total: int
    predictions: tuple[str, ...]

    @property
    def value(self) -> float:
        """Return the share of exact matches."""
        return self.correct / self.total


def stop_ids_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: those of the tokenizer and of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None) if model.generation_config else None
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*listed, tokenizer.eos_token_id) if i is not None)


def exact_match(
    model: Any, tokenizer: Any, items: Iterable[GenerationItem], *, max_new_tokens: int = 128, batch_size: int = 8
) -> ExactMatch:
    """Return how often the greedy answer equals the reference after stripping white space.

    Raises:
        DataError: there is no item, or a prompt has no token.
    """
    items = list(items)
    if not items:
        raise DataError("there is no item to generate for")
    answers = generate(
        model,
        [item.prompt_ids for item in items],
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids_of(model, tokenizer),
        batch_size=batch_size,
    )
    texts = tuple(tokenizer.decode(answer, skip_special_tokens=True) for answer in answers)
    correct = sum(text.strip() == item.reference.strip() for text, item in zip(texts, items, strict=True))
    return ExactMatch(correct, len(items), texts)


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    batch_size: int = 8,
) -> list[list[int]]:
    """Return the greedy continuation of each prompt without its stop token, in the order of ``prompts``.

    Args:
        model: a transformers causal LM with a key-value cache.
        prompts: token ids; prompts of similar length share a batch, padded on the left.
        max_new_tokens: tokens generated per prompt at most.
        stop_ids: tokens that end a continuation.
        batch_size: prompts per forward.

    Raises:
        DataError: a prompt has no token.
    """
    if any(not len(prompt) for prompt in prompts):
        raise DataError("a prompt has no token, so nothing can follow it")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluating(model), unpacked(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            generated = _generate_batch(model, [prompts[i] for i in batch], max_new_tokens, stop_ids)
            for index, answer in zip(batch, generated, strict=True):
                answers[index] = answer
    return answers


def _generate_batch(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: frozenset[int]
) -> list[list[int]]:
    device = next(model.get_input_embeddings().parameters()).device
    input_ids, mask = _pad_left(prompts, device)
    answers: list[list[int]] = [[] for _ in prompts]
    running, cache = set(range(len(prompts))), None
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
        output = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        input_ids = output.logits[:, -1].argmax(-1, keepdim=True)
        for row, token in enumerate(input_ids[:, 0].tolist()):
            if token in stop_ids:
                running.discard(row)
            if row in running:
                answers[row].append(token)
        if not running:
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=-1)
    return answers


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both int64 [B, T]; padding is masked by position, so that its id does not matter."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor([int(token) for token in prompt])
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
