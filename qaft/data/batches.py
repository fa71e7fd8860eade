"""Micro-batches in an order that depends on nothing but the seed: not on the number of processes, not on a resume.

    rows      shuffle(epoch 0) -> pack -> rows, shuffle(epoch 1) -> pack -> rows, ...: one endless list
    step s    rows [s * G * B, (s + 1) * G * B)        B = batch_size over all processes, G = grad_accumulation
    rank r    of each micro-batch of B rows, rows [r * B / W, (r + 1) * B / W)        W = world_size

An epoch that ends inside a step goes on with the next one, so no sample is dropped and none is seen twice in an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qaft.data.files import Provenance
from qaft.data.packing import collate, pack, padded_length
from qaft.data.samples import IGNORE_INDEX, Sample
from qaft.errors import DataError, RecipeError

if TYPE_CHECKING:
    from qaft.data.options_batch import OptionsBatch

SEED_MASK = 2**64 - 1
"""numpy seeds are not negative; ours may be."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one rank.

    law:  num_targets == sum over ranks and micro-batches of the step of (labels[:, 1:] != IGNORE_INDEX).sum()

    Attributes:
        input_ids: int64 [B, T].
        labels: int64 [B, T], aligned with input_ids (the loss shifts by one); IGNORE_INDEX where there is no loss, and
            at the first token of every sample.
        position_ids: int64 [B, T], from 0 in every sample.
        attention_mask: always None: the samples of a row are kept apart by their positions, see packing.py.
        num_targets: positions with loss in the WHOLE optimizer step, over all ranks and micro-batches: the normaliser.
        num_tokens: tokens of this micro-batch on this rank, padding not counted.
        step: optimizer step, from 0 (of evaluation batches: the number of the batch).
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    num_targets: int
    num_tokens: int
    step: int

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of a transformers model; without ``use_cache=False`` packed samples see each other."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
            "use_cache": False,
        }

    def loss_inputs(self) -> dict[str, Tensor | None]:
        """Return the arguments of ``qaft.train.loss.CausalLoss``."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
        }

    def examples(self) -> Tensor:
        """Return the number of the sample at each position, [B, T] from 0; padding that restarts counts as one."""
        starts = self.position_ids == 0
        starts[:, 0] = True
        return starts.flatten().cumsum(0).view_as(starts) - 1

    def example_targets(self) -> Tensor:
        """Return the number of positions with loss of each sample, [N] as ``examples`` numbers them."""
        examples = self.examples()
        has_target = self.labels[:, 1:] != IGNORE_INDEX
        return torch.bincount(examples[:, 1:][has_target], minlength=int(examples.max()) + 1)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
        )


class AnySample(Protocol):
    """What batches are planned by: a length, and how much it counts in the mean loss."""

    @property
    def source(self) -> Provenance:
        """Where the row stands."""
        ...

    @property
    def num_targets(self) -> int:
        """Targets of the sample."""
        ...

    def __len__(self) -> int:
        """Return the number of tokens."""
        ...


def make_batch(rows: Sequence[Sequence[Sample]], length: int, pad_id: int, num_targets: int, step: int) -> Batch:
    """Return rows of samples as a batch of ``length`` columns; the arguments are those of ``collate`` and ``Batch``."""
    input_ids, labels, position_ids = collate(rows, length, pad_id)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        attention_mask=None,
        num_targets=num_targets,
        num_tokens=sum(len(sample) for row in rows for sample in row),
        step=step,
    )


MakeBatch = Callable[[Sequence[Sequence[Any]], int, int, int, int], "Batch | OptionsBatch"]
"""``make_batch``, or what does the same for another kind of sample."""


class TrainBatches:
    """The training batches of one rank, from any optimizer step on.

    Args:
        samples: each at most ``max_length`` tokens.
        max_length: tokens per row.
        batch_size: B, rows per micro-batch over all processes; a multiple of ``world_size``.
        grad_accumulation: G, micro-batches per optimizer step.
        steps: optimizer steps of the run.
        packing: several samples in one row; otherwise one.
        seed: of the shuffle; the order of an epoch depends on (seed, epoch) alone.
        rank: this process.
        world_size: W, processes.
        pad_id: id at padded positions; any, also that of EOS.
        make: makes a batch of rows of such samples.

    Attributes:
        samples: as given.

    Raises:
        RecipeError: batch_size is no multiple of world_size.
        DataError: no sample, or one that is longer than ``max_length``.
    """

    def __init__(
        self,
        samples: Sequence[AnySample],
        *,
        max_length: int,
        batch_size: int,
        grad_accumulation: int,
        steps: int,
        packing: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pad_id: int = 0,
        make: MakeBatch = make_batch,
    ) -> None:
        self.samples = _checked(samples, max_length)
        self._lengths = [len(sample) for sample in samples]
        self._num_targets = [sample.num_targets for sample in samples]
        self._max_length = max_length
        self._batch_size = batch_size
        self._accumulation = grad_accumulation
        self._steps = steps
        self._packing = packing
        self._seed = seed
        self._share = _rank_slice(batch_size, rank, world_size)
        self._pad_id = pad_id
        self._make = make

    def epoch_rows(self, epoch: int) -> list[tuple[int, ...]]:
        """Return the rows of an epoch as sample indices; every sample is in exactly one."""
        order = np.random.default_rng((self._seed & SEED_MASK, epoch)).permutation(len(self.samples)).tolist()
        if not self._packing:
            return [(index,) for index in order]
        return pack(self._lengths, order, self._max_length)

    def from_step(self, step: int) -> Iterator[Batch | OptionsBatch]:
        """Yield the micro-batches from optimizer step ``step`` on; they equal those of a run that was never stopped."""
        rows_per_step = self._batch_size * self._accumulation
        rows = self._rows_from(step * rows_per_step)
        for current in range(step, self._steps):
            step_rows = list(islice(rows, rows_per_step))
            num_targets = sum(self._num_targets[index] for row in step_rows for index in row)
            for begin in range(0, rows_per_step, self._batch_size):
                micro = step_rows[begin : begin + self._batch_size]
                # The length is that of all ranks, so that a row has the same shape whatever the world size.
                length = padded_length(micro, self._lengths, self._max_length)
                mine = [[self.samples[index] for index in row] for row in micro[self._share]]
                yield self._make(mine, length, self._pad_id, num_targets, current)

    def _rows_from(self, position: int) -> Iterator[tuple[int, ...]]:
        for epoch in count():
            # Without packing the number of rows is known, so that whole epochs are skipped without shuffling them.
            if not self._packing and position >= len(self.samples):
                position -= len(self.samples)
                continue
            rows = self.epoch_rows(epoch)
            yield from rows[position:]
            position = max(0, position - len(rows))


class EvalBatches:
    """Evaluation batches of one rank: the samples in order, one per row, each exactly once; the last batch is smaller.

    Every rank yields the same number of batches, as collective operations need it: a rank without a row in the last
    batch yields one row of padding without targets.

    Args:
        samples: each at most ``max_length`` tokens.
        max_length: tokens per row.
        batch_size: rows per batch over all processes; a multiple of ``world_size``.
        rank: this process.
        world_size: processes.
        pad_id: id at padded positions.
        make: makes a batch of rows of such samples.

    Attributes:
        samples: as given.

    Raises:
        RecipeError: batch_size is no multiple of world_size.
        DataError: no sample, or one that is longer than ``max_length``.
    """

    def __init__(
        self,
        samples: Sequence[AnySample],
        *,
        max_length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        pad_id: int = 0,
        make: MakeBatch = make_batch,
    ) -> None:
        self.samples = _checked(samples, max_length)
        self._max_length = max_length
        self._batch_size = batch_size
        self._share = _rank_slice(batch_size, rank, world_size)
        self._pad_id = pad_id
        self._make = make

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.samples) // self._batch_size)

    def __iter__(self) -> Iterator[Batch | OptionsBatch]:
        """Yield the batches; ``num_targets`` counts a batch over all ranks, ``step`` its number."""
        for number in range(len(self)):
            batch = self.samples[number * self._batch_size : (number + 1) * self._batch_size]
            length = padded_length([(i,) for i in range(len(batch))], [len(s) for s in batch], self._max_length)
            mine = [[sample] for sample in batch[self._share]] or [[]]
            yield self._make(mine, length, self._pad_id, sum(sample.num_targets for sample in batch), number)


def _checked(samples: Sequence[AnySample], max_length: int) -> Sequence[AnySample]:
    if not samples:
        raise DataError("no sample to make batches of; check the data files and data.max_length")
    for sample in samples:
        if len(sample) > max_length:
            raise DataError(f"{sample.source}: a sample of {len(sample)} tokens does not fit into {max_length}")
    return samples


def _rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    if batch_size % world_size:
        raise RecipeError(
            f"train.batch_size={batch_size} counts rows over all {world_size} processes and must be a multiple of "
            f"{world_size}; set it to {-(-batch_size // world_size) * world_size}"
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)
