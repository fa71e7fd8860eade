"""The loss of a choice between options, slowly: every option after its prompt in a pass of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Choice(Protocol):
    """A prompt with its options."""

    prompt_ids: Sequence[int]
    option_ids: Sequence[Sequence[int]]
    label: int


def option_score(model: Any, prompt: Sequence[int], option: Sequence[int]) -> Tensor:
    """Return the sum of log p over the tokens of an option, from the logits of the plain sequence."""
    ids = torch.tensor([*prompt, *option])
    log_probs = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    return torch.stack([log_probs[place - 1, ids[place]] for place in range(len(prompt), len(ids))]).sum()


def choice_loss(model: Any, item: Choice) -> Tensor:
    """Return -log of the softmax over the scores of the options, at the right one."""
    scores = [option_score(model, item.prompt_ids, option) for option in item.option_ids]
    return -torch.stack(scores).log_softmax(0)[item.label]


def choice_losses(model: Any, items: Sequence[Choice]) -> Tensor:
    """Return the loss of each item, [N]."""
    return torch.stack([choice_loss(model, item) for item in items])
