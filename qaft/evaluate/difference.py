"""How far two models are apart, from their fp32 logits on the same prompts.

    max relative   max over tokens t of  max_v |a - b| / max_v |a|
    KL             mean over tokens of  sum_v p_a log(p_a / p_b),  nats
    perplexity     exp(mean NLL of each prompt's next tokens)

Shapes: T = tokens of a prompt, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from qaft.errors import DataError, ModelError
from qaft.evaluate.float32 import float_logits
from qaft.models.plain import load_plain

PROMPTS = (
    "The old lighthouse keeper climbed the stairs every evening to light the lamp.",
    "Water boils at a lower temperature on a mountain because the air pressure is lower there.",
    "Question: What is 17 plus 25? Answer: 42. Question: What is 9 times 8? Answer:",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))\n",
    '{"name": "Ada", "born": 1815, "city": "London", "languages": ["English", "French"]}',
    "Dear Ms. Rossi, thank you for your order. The parcel will reach you on Thursday morning.",
    "In the garden there were red tulips, yellow daffodils and a single white rose.",
    "First preheat the oven, then mix the flour with the butter, and finally add two eggs.",
)
"""Sentences written for this project: prose, arithmetic, code and markup in few tokens."""

MAX_PROMPT_TOKENS = 256
"""Longer prompts are cut: logits of every token are kept, 150 MB for 256 tokens of a vocabulary of 150k."""


@dataclass(frozen=True, eq=False)
class PromptLogits:
    """``ids``: int64 [T] per prompt; ``logits``: fp32 [T, V] per prompt, on the CPU."""

    ids: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What ``compare_logits`` measures; ``a`` is the reference.

    Attributes:
        max_abs: largest absolute difference of two logits.
        rms: root of the mean squared difference.
        max_relative: largest difference within a token, relative to that token's largest logit of ``a``.
        kl_mean: KL(a || b) in nats per token.
        top1_agreement: share of tokens with the same most likely next token.
        perplexity_a: perplexity of ``a`` on the prompts.
        perplexity_b: perplexity of ``b`` on the prompts.
        num_tokens: tokens compared.
    """

    max_abs: float
    rms: float
    max_relative: float
    kl_mean: float
    top1_agreement: float
    perplexity_a: float
    perplexity_b: float
    num_tokens: int


def prompt_ids(tokenizer: Any, texts: Sequence[str] = PROMPTS) -> tuple[Tensor, ...]:
    """Return the token ids of each text, int64 [T], with T in [2, MAX_PROMPT_TOKENS]; texts of one token are left out.

    Raises:
        DataError: no text has two tokens.
    """
    encoded = [list(tokenizer(text).input_ids)[:MAX_PROMPT_TOKENS] for text in texts]
    ids = tuple(torch.tensor(tokens, dtype=torch.int64) for tokens in encoded if len(tokens) > 1)
    if not ids:
        raise DataError(f"none of the {len(texts)} prompts has two tokens, so no next token can be compared")
    return ids


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the lines of a UTF-8 text file that are not blank.

    Raises:
        DataError: the file cannot be read or holds no such line.
    """
    try:
        lines = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not lines:
        raise DataError(f"{path}: holds no prompt; write one prompt a line")
    return lines


def logits_of(
    thing: nn.Module | str | Path, ids: Sequence[Tensor], *, device: torch.device | str = "cpu"
) -> PromptLogits:
    """Return the fp32 logits of a live model, or of a folder, file or hub id that plain transformers loads.

    Raises:
        ModelError: the checkpoint cannot be loaded, or an id is outside of its vocabulary.
    """
    model = thing if isinstance(thing, nn.Module) else load_plain(str(thing), device=device)[0]
    vocabulary = len(next(model.get_input_embeddings().parameters()))  # pyright: ignore
    if (largest := max(int(tokens.max()) for tokens in ids)) >= vocabulary:
        raise ModelError(
            f"token {largest} is outside of the vocabulary of {vocabulary}: the models do not share a tokenizer"
        )
    return PromptLogits(tuple(ids), float_logits(model, ids))


def compare_logits(a: PromptLogits, b: PromptLogits) -> Difference:
    """Return how far ``b`` is from the reference ``a``; sums are formed in fp64.

    Raises:
        ModelError: the prompts or the vocabularies differ.
    """
    same_prompts = len(a.ids) == len(b.ids) and all(torch.equal(x, y) for x, y in zip(a.ids, b.ids, strict=True))
    if not same_prompts or any(x.shape != y.shape for x, y in zip(a.logits, b.logits, strict=True)):
        shapes = tuple(a.logits[0].shape), tuple(b.logits[0].shape)
        raise ModelError(
            f"logits {shapes[0]} and {shapes[1]} cannot be compared: the prompts or the vocabularies differ"
        )
    parts = torch.stack([_sums(ids, x, y) for ids, x, y in zip(a.ids, a.logits, b.logits, strict=True)])  # [prompts, 8]
    max_abs, max_relative = parts[:, 0].max(), parts[:, 1].max()
    squares, kl, agreed, nll_a, nll_b, num_next = parts[:, 2:].sum(0).tolist()
    num_tokens = sum(len(ids) for ids in a.ids)
    return Difference(
        max_abs=float(max_abs),
        rms=math.sqrt(squares / (num_tokens * a.logits[0].shape[-1])),
        max_relative=float(max_relative),
        kl_mean=kl / num_tokens,
        top1_agreement=agreed / num_tokens,
        perplexity_a=_exp(nll_a / num_next),
        perplexity_b=_exp(nll_b / num_next),
        num_tokens=num_tokens,
    )


def _sums(ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return fp64 [8]: max |a-b|, max relative; sums of squares, KL, agreements, NLL of a and b; next tokens."""
    a, b = a.double(), b.double()
    gap = (a - b).abs()
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    # A logit of -inf has probability 0 in both models and contributes nothing.
    kl = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum()
    following = ids[1:, None]
    values = (
        gap.max(),
        (gap.amax(-1) / a.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)).max(),
        gap.square().sum(),
        kl,
        (a.argmax(-1) == b.argmax(-1)).sum(),
        -log_p[:-1].gather(1, following).sum(),
        -log_q[:-1].gather(1, following).sum(),
        torch.tensor(len(following)),
    )
    return torch.stack([value.double() for value in values])


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def difference_table(difference: Difference, *, a: str = "A", b: str = "B") -> Table:
    """Return the difference as a rich table for the terminal."""
    table = Table("measure", "value", title=f"{b} against {a}, {difference.num_tokens} tokens")
    table.add_row("max relative logit difference", f"{difference.max_relative:.2e}")
    table.add_row("max absolute logit difference", f"{difference.max_abs:.2e}")
    table.add_row("rms logit difference", f"{difference.rms:.2e}")
    table.add_row("KL, nats per token", f"{difference.kl_mean:.2e}")
    table.add_row("same most likely token", f"{difference.top1_agreement:.1%}")
    table.add_row(f"perplexity of {a}", f"{difference.perplexity_a:.3f}")
    table.add_row(f"perplexity of {b}", f"{difference.perplexity_b:.3f}")
    return table
