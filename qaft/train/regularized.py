"""The loss module of a run whose regularizers compare passes: inside the module, so that engines see one forward.

    value = N / N' * (sum of losses + terms over the N' targets of the rows that were run)        N targets in all

In evaluation, without gradients, and for sums by group it is the plain loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qaft.layers.adapted import AdaptedLinear
from qaft.regularizers.base import PassTerm
from qaft.train.loss import IGNORE_INDEX, CausalLoss


@dataclass(frozen=True)
class LossPasses:
    """``qaft.regularizers.base.Passes`` over a micro-batch."""

    hidden: Tensor
    loss: CausalLoss
    layers: Mapping[str, AdaptedLinear]
    seed: int
    inputs: Mapping[str, Tensor | None]
    random_states: Sequence[Tensor]

    @property
    def input_ids(self) -> Tensor:
        """Tokens of the rows."""
        tokens = self.inputs["input_ids"]
        assert tokens is not None
        return tokens

    @property
    def labels(self) -> Tensor:
        """Labels of the rows, not shifted."""
        labels = self.inputs["labels"]
        assert labels is not None
        return labels

    @property
    def model(self) -> nn.Module:
        """The causal language model."""
        return self.loss.model

    def again(self) -> Tensor:
        """Return the hidden states of another pass with the random states of the first."""
        with _random_states(self.hidden.device, self.random_states):
            return self.loss.at_targets(**self.inputs)[0]  # pyright: ignore[reportArgumentType]

    def over_logits(self, term: Callable[..., Tensor], *hidden: Tensor) -> Tensor:
        """Return ``term`` of the logits, see ``CausalLoss.over_logits``."""
        return self.loss.over_logits(term, *hidden)


class RegularizedLoss(nn.Module):
    """``CausalLoss`` plus terms that compare passes; takes and returns what it does.

    Args:
        loss: the plain loss.
        terms: weighted terms.
        layers: adapted layers by name.

    Attributes:
        step: index of the optimizer step, which whoever trains sets; terms may act on some steps only.
    """

    def __init__(self, loss: CausalLoss, terms: Sequence[PassTerm], layers: Mapping[str, AdaptedLinear]) -> None:
        super().__init__()
        self.loss = loss
        self.terms = tuple(terms)
        self.layers = dict(layers)
        self.step = 0

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """Return the regularized sum of losses, a scalar; see ``CausalLoss.forward``."""
        if groups is not None or not (self.training and torch.is_grad_enabled()):
            return self.loss(input_ids, labels, position_ids, attention_mask, groups)
        rows = min(term.rows(len(labels), self.step) for term in self.terms)
        given = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        inputs = {k: None if v is None else v[:rows] for k, v in (given | {"attention_mask": attention_mask}).items()}
        states = _get_random_states(labels.device)
        with _random_states(labels.device, states):
            # Drawn where it is put back: a run without noise has the dropout masks of a plain one.
            seed = int(torch.randint(2**62, ()))
        with ExitStack() as first:
            for term in self.terms:
                first.enter_context(term.first_pass(self.layers, seed))
            hidden, targets = self.loss.at_targets(**inputs)  # pyright: ignore[reportArgumentType]
        passes = LossPasses(hidden, self.loss, self.layers, seed, inputs, states)
        total = self.loss.head_loss(hidden, targets)
        for term in self.terms:
            total = total + term(passes, self.step)
        return total if rows == len(labels) else total * (_num_targets(labels) / _num_targets(labels[:rows]).clamp(1))


def _num_targets(labels: Tensor) -> Tensor:
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def _get_random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def _random_states(device: torch.device, states: Sequence[Tensor]) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield
