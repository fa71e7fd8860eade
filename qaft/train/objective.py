"""What is minimised: mean loss over the targets of an optimizer step, plus regularizers; a function of theta alone.

    micro-batch value = world_size * (sum of its losses + its targets * R(theta)) / (targets of the step)

Summed over micro-batches and averaged over ranks (as data-parallel engines average gradients) this is
``mean loss + R(theta)``, whatever the split: 1 x 8 rows equals 8 x 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from qaft.errors import DataError
from qaft.layers.reach import reached, zero_for_others

if TYPE_CHECKING:
    from qaft.train.engine import Engine

Penalty = Callable[[Mapping[str, nn.Module]], Tensor]
"""A regularizer: adapted layers by name -> scalar term, already weighted."""


class MicroBatch(Protocol):
    """What training reads of a batch."""

    @property
    def num_targets(self) -> int:
        """Targets of the whole optimizer step, over all micro-batches and ranks."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of this micro-batch on this rank, padding excluded."""
        ...

    @property
    def step(self) -> int:
        """Index of the optimizer step, from 0."""
        ...

    def loss_inputs(self) -> dict[str, Tensor | None]:
        """Return what the loss module takes, each [B, ...]."""
        ...

    def examples(self) -> Tensor:
        """Return the number of the example, from 0, at whatever the loss module adds up; [B, ...], row after row."""
        ...

    def example_targets(self) -> Tensor:
        """Return the targets of each example, int64 [N]."""
        ...


def local_targets(batch: MicroBatch) -> int:
    """Return the number of targets of this micro-batch on this rank."""
    return int(batch.example_targets().sum())


def noise_seed(*parts: int) -> int:
    """Return a 63-bit seed that depends on every part (run seed, step, micro-batch, rank) and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run the block with torch's generators seeded, and put their states back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Objective:
    """Task loss plus regularizers, as a closure over one micro-batch.

    Args:
        regularizers: each is called with ``layers`` after the forward pass and returns its weighted scalar.
        layers: adapted layers by name.
        on_step: is told the index of the optimizer step before each forward pass.
    """

    def __init__(
        self,
        regularizers: Sequence[Penalty] = (),
        layers: Mapping[str, nn.Module] | None = None,
        *,
        on_step: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.regularizers = tuple(regularizers)
        self.layers = dict(layers or {})
        self._on_step = on_step

    def __call__(self, engine: Engine, batch: MicroBatch, *, seed: int) -> Tensor:
        """Return the value of the equation above; equal theta and seed give an equal value.

        With gradients on, the mean over ranks is the micro-batch's part of the objective. With gradients off
        (zeroth-order sources) no engine would average anything, so the ranks' parts are summed here: one float, equal
        on every rank.

        Raises:
            DataError: the optimizer step holds no target.
        """
        if batch.num_targets < 1:
            raise DataError(
                f"step {batch.step}: no position carries loss, so there is nothing to learn from; "
                "check data.train_on and data.max_length"
            )
        self._on_step(batch.step)
        with seeded(seed, engine.device):
            total = self._total(engine, batch)
            if self.regularizers:
                terms = torch.stack([penalty(self.layers).to(total) for penalty in self.regularizers])
                total = total + terms.sum() * local_targets(batch)
        value = total / batch.num_targets
        return value * engine.world_size if torch.is_grad_enabled() else engine.sum_over_ranks(value)

    def _total(self, engine: Engine, batch: MicroBatch) -> Tensor:
        """Return the sum of losses, with a gradient (zero where a layer was not reached) for every trained layer."""
        if not torch.is_grad_enabled():
            return engine(**batch.loss_inputs())
        with reached(self.layers) as names:
            total = engine(**batch.loss_inputs())
        zero = zero_for_others(self.layers, names)
        return total if zero is None else total + zero.to(total)
