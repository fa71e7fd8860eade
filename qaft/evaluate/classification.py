"""Accuracy of a verbalizer: the class whose text is the most likely completion of the prompt.

score(option) = sum over the option's tokens of log p(token | prompt, preceding tokens)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from qaft.errors import DataError
from qaft.evaluate.head import TokenScorer
from qaft.layers.mode import evaluating


class ClassificationItem(Protocol):
    """A prompt, the completions that stand for the classes, and the index of the right one."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """Token ids of the prompt, at least one."""
        ...

    @property
    def option_ids(self) -> Sequence[Sequence[int]]:
        """Token ids of each class's text, at least one each."""
        ...

    @property
    def label(self) -> int:
        """Index of the right option."""
        ...


@dataclass(frozen=True)
class Accuracy:
    """How often the right option wins, and how sure it is.

    Attributes:
        correct: items whose right option has the largest score.
        total: items.
        predictions: the chosen option of each item, in order.
        loss: mean of -score(right option), in nats.
        choice_loss: mean of -log softmax over the options' scores at the right one, in nats.
    """

    correct: int
    total: int
    predictions: tuple[int, ...]
    loss: float
    choice_loss: float

    @property
    def value(self) -> float:
        """Return the share of right predictions."""
        return self.correct / self.total


@torch.no_grad()
def verbalizer_accuracy(model: Any, items: Iterable[ClassificationItem], *, batch_size: int = 8) -> Accuracy:
    """Return the accuracy over items; between equal scores the first option wins.

    Args:
        model: a causal LM.
        items: what is to be classified.
        batch_size: items per forward; options that differ in their last token alone share one row.

    Raises:
        DataError: there is no item, or a prompt or an option has no token.
    """
    predictions: list[int] = []
    correct, loss, choice_loss, pending = 0, 0.0, 0.0, iter(items)
    with evaluating(model):
        scorer = TokenScorer(model)
        while batch := list(islice(pending, batch_size)):
            scores = [torch.stack(of_options) for of_options in _scores(scorer, batch)]
            chosen = [int(of_options.argmax()) for of_options in scores]
            predictions += chosen
            for of_options, option, item in zip(scores, chosen, batch, strict=True):
                loss -= float(of_options[item.label])
                choice_loss -= float(of_options.log_softmax(0)[item.label])
                correct += option == item.label
    if not predictions:
        raise DataError("there is no item to classify")
    return Accuracy(
        correct, len(predictions), tuple(predictions), loss / len(predictions), choice_loss / len(predictions)
    )


def _scores(scorer: TokenScorer, batch: Sequence[ClassificationItem]) -> list[list[Tensor]]:
    """Return each item's log-probability of each option."""
    rows: dict[tuple[int, ...], int] = {}
    for item in batch:
        if not len(item.prompt_ids) or any(not len(option) for option in item.option_ids):
            raise DataError("a prompt or an option has no token, so it has no probability; check the verbalizers")
        for option in item.option_ids:
            rows.setdefault((*item.prompt_ids, *option[:-1]), len(rows))
    hidden = scorer.hidden([torch.tensor(row) for row in rows])  # [rows, T, H]
    return [
        [
            _option_score(scorer, hidden[rows[(*item.prompt_ids, *option[:-1])]], item, option)
            for option in item.option_ids
        ]
        for item in batch
    ]


def _option_score(scorer: TokenScorer, hidden: Tensor, item: ClassificationItem, option: Sequence[int]) -> Tensor:
    first = len(item.prompt_ids) - 1
    targets = torch.tensor([int(token) for token in option], device=hidden.device)
    return scorer.log_probs(hidden[first : first + len(option)], targets).double().sum()
