"""The interfaces of regularizers: pulls towards the base model, by the place where they act.

    Penalty     a term of the parameters, added to the loss
    PassTerm    a term of what the model computes, beside other passes over the same batch
    StepRule    a change of the parameters before each optimizer step

Each is 0 (or changes nothing) while the parameters are where they started, but for the noise that a term is about.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from qaft.layers.adapted import AdaptedLinear


class Regularizer:
    """One entry of the recipe's ``regularize``: a subclass of one of the three kinds below."""

    def prepare(self, layers: Mapping[str, AdaptedLinear]) -> None:
        """Take what is needed from the adapted layers, once, before the first step; nothing by default.

        Raises:
            ValueError: the layers' updates have nothing that this regularizer acts on.
        """
        return


class Penalty(Regularizer):
    """A term of the parameters."""

    @abstractmethod
    def __call__(self, layers: Mapping[str, nn.Module]) -> Tensor:
        """Return the weighted scalar term."""


class Passes(Protocol):
    """The trained model's pass over a micro-batch, and how to make others."""

    @property
    def hidden(self) -> Tensor:
        """What the head reads at the N targets, [N, H], with a graph."""
        ...

    @property
    def input_ids(self) -> Tensor:
        """Tokens of the rows, [B, T]."""
        ...

    @property
    def labels(self) -> Tensor:
        """Labels of the rows, [B, T], not shifted."""
        ...

    @property
    def model(self) -> nn.Module:
        """The causal language model."""
        ...

    @property
    def layers(self) -> Mapping[str, AdaptedLinear]:
        """The adapted layers by name."""
        ...

    @property
    def seed(self) -> int:
        """A number of this micro-batch, for noise."""
        ...

    def again(self) -> Tensor:
        """Return the hidden states of another pass over the same rows, [N, H], with the same dropout masks."""
        ...

    def over_logits(self, term: Callable[..., Tensor], *hidden: Tensor) -> Tensor:
        """Return ``term`` of the logits of each of ``hidden``, summed over targets; no [N, V] is ever held."""
        ...


class PassTerm(Regularizer):
    """A term of the model's outputs."""

    @property
    def remembers_samples(self) -> bool:
        """Whether the term needs what this process computed for a sample in an earlier step; not by default."""
        return False

    def rows(self, batch_size: int, step: int) -> int:
        """Return how many rows of the micro-batch the coming pass is made of; all by default."""
        return batch_size

    def first_pass(self, layers: Mapping[str, AdaptedLinear], seed: int) -> AbstractContextManager[Any]:
        """Return the context of the pass that gives the task loss; nothing special by default."""
        return nullcontext()

    @abstractmethod
    def __call__(self, passes: Passes, step: int) -> Tensor:
        """Return the weighted term, summed over the targets."""

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return what a run resumed at ``step`` needs to continue with the same terms (JSON-able or tensors)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``; nothing by default."""
        return


class StepRule(Regularizer):
    """A change of the parameters with each optimizer step."""

    @abstractmethod
    def before_step(self, optimizer: Optimizer) -> None:
        """Change the parameters of ``optimizer``, whose gradients are those of the step, just before it steps."""
