"""What a training run is made of (filled by the composition root) and how far it has come."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from qaft.gradients.base import GradientSource
from qaft.recipe import Recipe
from qaft.regularizers.base import PassTerm
from qaft.sections import TrainSection
from qaft.train.diagnostics import Diagnostics
from qaft.train.journal import Journal
from qaft.train.log import RunLog
from qaft.train.objective import MicroBatch, Objective
from qaft.train.rng import RngState, capture_rng

if TYPE_CHECKING:
    from qaft.train.engine import Engine


class TrainingBatches(Protocol):
    """Training data as a function of the step, so that a resumed run sees what it would have seen."""

    def from_step(self, step: int) -> Iterable[MicroBatch]:
        """Return this rank's micro-batches from optimizer step ``step`` on, ``grad_accumulation`` for each step."""
        ...


class Reselecting(Protocol):
    """What chooses the rotations of a run again while it is trained."""

    @property
    def recipe(self) -> Recipe:
        """The recipe with the rotations that are in use."""
        ...

    def __call__(self) -> Mapping[str, float]:
        """Choose again, turn the run into the choice, and return values for the log."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """Everything ``fit`` needs.

    ``engine.module`` is the loss module, ``params`` its trainable parameters by name, ``optimizer`` the one that the
    engine steps, over the same parameters; ``scheduler`` is stepped once per optimizer step. ``buffers`` are the
    persistent buffers of updates by name. ``eval_batches`` can be iterated again and again; None for no evaluation.
    ``terms`` are the regularizers that compare passes. ``diagnostics`` watches quantization on rank 0; None for none.
    ``journal`` is there for sources whose steps follow from scalars, ``reselection`` where rotations are chosen again.
    ``log`` and checkpoints live in ``folder``.
    """

    recipe: Recipe
    engine: Engine
    objective: Objective
    source: GradientSource
    params: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    scheduler: LRScheduler
    batches: TrainingBatches
    log: RunLog
    folder: Path
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    eval_batches: Iterable[MicroBatch] | None = None
    terms: Sequence[PassTerm] = ()
    diagnostics: Diagnostics | None = None
    journal: Journal | None = None
    reselection: Reselecting | None = None

    @property
    def current_recipe(self) -> Recipe:
        """The recipe with the rotations that are in use."""
        return self.recipe if self.reselection is None else self.reselection.recipe

    @property
    def section(self) -> TrainSection:
        """The ``train`` section of the recipe."""
        return self.recipe.train

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate of the coming step by group name."""
        return {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """How far a run has come; all that is saved is as it was when ``step`` steps were finished.

    ``rng`` and ``source`` (random generators, gradient source) are taken at that moment, so that a run stopped inside a
    step goes on from the step's beginning. ``micro_batches``, ``loss`` and ``step_tokens`` belong to the step under way
    and are not saved.
    """

    step: int = 0
    tokens: int = 0
    unlogged_losses: tuple[float, ...] = ()
    rng: RngState = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    micro_batches: int = 0
    loss: Tensor | None = None
    step_tokens: int = 0

    def taken(self, source: GradientSource, device: torch.device) -> TrainState:
        """Return this state with ``rng`` and ``source`` as they are now."""
        return replace(self, rng=capture_rng(device), source=copy.deepcopy(source.state_dict()))

    def accumulate(self, loss: Tensor, tokens: int) -> TrainState:
        """Return the state after one more micro-batch; ``loss`` is detached and stays on its device."""
        total = loss if self.loss is None else self.loss + loss
        return replace(self, micro_batches=self.micro_batches + 1, loss=total, step_tokens=self.step_tokens + tokens)

    def advance(self, loss: float, tokens: int) -> TrainState:
        """Return the state after a finished step with its mean loss and its tokens over all ranks."""
        return TrainState(
            step=self.step + 1, tokens=self.tokens + tokens, unlogged_losses=(*self.unlogged_losses, loss)
        )

    def logged(self) -> TrainState:
        """Return this state after its losses have been logged."""
        return replace(self, unlogged_losses=())
