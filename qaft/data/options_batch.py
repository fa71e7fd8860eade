"""Rows of options as tensors: which tokens see which, and where each token of an option is predicted.

Shapes: B = rows, T = tokens of a row, S = places in a row where something is predicted, K = options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from qaft.data.options import OptionsSample
from qaft.data.samples import IGNORE_INDEX

PADDING = -1
"""Branch of a padded place."""


@dataclass(frozen=True)
class OptionsBatch:
    """One micro-batch of classification rows on one rank; every row is one example and one target.

    Attributes:
        input_ids: int64 [B, T].
        position_ids: int64 [B, T]; every option goes on from the end of the stem.
        branches: int64 [B, T], 0 in the stem, k + 1 in option k, PADDING behind; None where no row has an option of
            several tokens after the stem, so that plain causal attention is all that is needed.
        places: int64 [B, S], columns of the row from which tokens are predicted; the first is the stem's end.
        tokens: int64 [B, S, K], what option k has after each place; IGNORE_INDEX where it has nothing.
        chosen: int64 [B], the right option; IGNORE_INDEX in a row of padding.
        num_targets: rows of the WHOLE optimizer step, over all ranks and micro-batches: the normaliser.
        num_tokens: tokens of this micro-batch on this rank, padding not counted.
        step: optimizer step, from 0 (of evaluation batches: the number of the batch).
    """

    input_ids: Tensor
    position_ids: Tensor
    branches: Tensor | None
    places: Tensor
    tokens: Tensor
    chosen: Tensor
    num_targets: int
    num_tokens: int
    step: int

    def loss_inputs(self) -> dict[str, Tensor | None]:
        """Return the arguments of ``qaft.train.option_loss.OptionsLoss``."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "branches": self.branches,
            "places": self.places,
            "tokens": self.tokens,
            "chosen": self.chosen,
        }

    def examples(self) -> Tensor:
        """Return the number of each row's example, [B, 1]."""
        return torch.arange(len(self.chosen)).unsqueeze(1)

    def example_targets(self) -> Tensor:
        """Return 1 for each row, 0 for padding, [B]."""
        return (self.chosen != IGNORE_INDEX).long()


def make_options_batch(
    rows: Sequence[Sequence[OptionsSample]], length: int, pad_id: int, num_targets: int, step: int
) -> OptionsBatch:
    """Return rows of one sample, or of none, as a batch of ``length`` columns; see ``qaft.data.batches.make_batch``."""
    samples = list(chain.from_iterable(rows))
    numbers = {len(sample.option_ids) for sample in samples} or {1}
    assert len(numbers) == 1  # one set of verbalizers: a missing option would have the score 0
    places = 1 + max((len(sample) - len(sample.stem) for sample in samples), default=0)
    batch = OptionsBatch(
        input_ids=torch.full((len(rows), length), pad_id),
        position_ids=torch.arange(length).repeat(len(rows), 1),
        branches=torch.full((len(rows), length), PADDING) if any(sample.is_tree for sample in samples) else None,
        places=torch.zeros(len(rows), places, dtype=torch.int64),
        tokens=torch.full((len(rows), places, *numbers), IGNORE_INDEX),
        chosen=torch.full((len(rows),), IGNORE_INDEX),
        num_targets=num_targets,
        num_tokens=sum(len(sample) for sample in samples),
        step=step,
    )
    for index, row in enumerate(rows):
        for sample in row:
            _write(batch, index, sample)
    return batch


def _write(batch: OptionsBatch, row: int, sample: OptionsSample) -> None:
    """Fill a row of the batch's tensors."""
    stem, endings = sample.stem, sample.endings
    begin, place = len(stem), 1
    batch.input_ids[row, :begin] = torch.tensor(stem)
    if batch.branches is not None:
        batch.branches[row, :begin] = 0
    batch.places[row, 0] = begin - 1
    batch.tokens[row, 0, : len(endings)] = torch.tensor([ending[0] for ending in endings])
    batch.chosen[row] = sample.label
    for number, ending in enumerate(endings):
        end, next_place = begin + len(ending) - 1, place + len(ending) - 1
        batch.input_ids[row, begin:end] = torch.tensor(ending[:-1])
        batch.position_ids[row, begin:end] = len(stem) + torch.arange(end - begin)
        if batch.branches is not None:
            batch.branches[row, begin:end] = number + 1
        batch.places[row, place:next_place] = torch.arange(begin, end)
        batch.tokens[row, place:next_place, number] = torch.tensor(ending[1:])
        begin, place = end, next_place
