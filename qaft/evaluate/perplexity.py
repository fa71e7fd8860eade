"""Perplexity of a text in blocks, or of tokenized samples on the tokens that carry loss.

perplexity = exp(sum of -log p(token | what precedes it in its block) / number of scored tokens)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from qaft.data.samples import IGNORE_INDEX, Sample
from qaft.errors import DataError
from qaft.evaluate.head import TokenScorer
from qaft.layers.mode import evaluating


@dataclass(frozen=True)
class Perplexity:
    """``nll``: summed negative log-likelihood in nats (fp64); ``tokens``: how many tokens were scored."""

    nll: float
    tokens: int

    @property
    def value(self) -> float:
        """Return ``exp(nll / tokens)``."""
        return math.exp(self.nll / self.tokens)


def text_perplexity(
    model: Any, ids: Tensor, *, max_length: int, stride: int | None = None, batch_size: int = 1
) -> Perplexity:
    """Return the perplexity of one long text.

    Args:
        model: a causal LM; evaluated in evaluation mode.
        ids: int64 [N].
        max_length: tokens per block.
        stride: tokens from one block to the next. ``max_length`` (None): disjoint blocks, the first token of each is
            not scored, as published WikiText numbers are computed. Smaller: blocks overlap and every token but the
            first is scored once, with at least ``max_length - stride`` tokens before it.
        batch_size: blocks per forward.

    Raises:
        DataError: fewer than two tokens.
        ValueError: a length is out of range.
    """
    stride = max_length if stride is None else stride
    if max_length < 2 or not 1 <= stride <= max_length:
        raise ValueError(f"max_length={max_length} must be at least 2, and stride={stride} in [1, max_length]")
    if len(ids) < 2:
        raise DataError(f"a text of {len(ids)} tokens has no next token to score")
    return _perplexity(model, _blocks(ids.long(), max_length, stride), batch_size)


def _blocks(ids: Tensor, max_length: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    scored_to = 0
    for begin in range(0, len(ids), stride):
        block = ids[begin : begin + max_length]
        labels = block.clone()
        labels[: max(scored_to - begin, 0)] = IGNORE_INDEX
        yield block, labels
        scored_to = begin + len(block)
        if scored_to == len(ids):
            return


def samples_perplexity(model: Any, samples: Iterable[Sample], *, max_length: int, batch_size: int = 8) -> Perplexity:
    """Return the perplexity over the labels of samples, each cut at ``max_length`` tokens.

    Raises:
        DataError: no label is left to score.
    """
    pairs = (
        (torch.from_numpy(s.input_ids[:max_length]).long(), torch.from_numpy(s.labels[:max_length]).long())
        for s in samples
    )
    return _perplexity(model, pairs, batch_size)


@torch.no_grad()
def _perplexity(model: Any, pairs: Iterable[tuple[Tensor, Tensor]], batch_size: int) -> Perplexity:
    with evaluating(model):
        scorer = TokenScorer(model)
        nll, tokens, pending = 0.0, 0, iter(pairs)
        while batch := list(islice(pending, batch_size)):
            hidden = scorer.hidden([ids for ids, _ in batch])
            for row, (_, labels) in zip(hidden, batch, strict=True):
                targets = labels[1:].to(scorer.device)
                wanted = targets != IGNORE_INDEX
                nll -= float(scorer.log_probs(row[: len(targets)][wanted], targets[wanted]).double().sum())
                tokens += int(wanted.sum())
    if not tokens:
        raise DataError("no token carries loss, so there is no perplexity; check data.train_on and data.max_length")
    return Perplexity(nll, tokens)
