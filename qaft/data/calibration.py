"""A few real training samples in one batch, with a mask of the tokens that are real: padding is never measured."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qaft.data.packing import collate, pack
from qaft.data.samples import Sample
from qaft.errors import DataError

ROW_TOKENS = 512
"""Longest row; longer samples are cut."""


@dataclass(frozen=True)
class Calibration:
    """One batch for the whole measurement.

    Attributes:
        input_ids: int64 [B, T].
        position_ids: int64 [B, T], from 0 in every sample, which keeps the samples of a row apart.
        real: bool [B, T], False for padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    real: Tensor

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of a transformers model."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}


def calibration_of(samples: Sequence[Sample], *, tokens: int, seed: int) -> Calibration:
    """Return random samples, packed into rows, until they hold ``tokens`` tokens or none is left.

    Raises:
        DataError: there is no sample.
    """
    if not samples:
        raise DataError("there is no sample to calibrate on: give data.train, or leave qat.rotation at hadamard")
    order = random.Random(seed).sample(range(len(samples)), len(samples))
    chosen: list[Sample] = []
    while order and sum(min(len(sample), ROW_TOKENS) for sample in chosen) < tokens:
        chosen.append(_cut(samples[order.pop()]))
    lengths = [len(sample) for sample in chosen]
    rows = pack(lengths, range(len(chosen)), ROW_TOKENS)
    sizes = torch.tensor([sum(lengths[index] for index in row) for row in rows])
    length = int(sizes.max())
    # Padding is masked here, so that its id does not matter.
    input_ids, _, position_ids = collate([[chosen[index] for index in row] for row in rows], length, pad_id=0)
    return Calibration(input_ids, position_ids, torch.arange(length) < sizes.unsqueeze(1))


def _cut(sample: Sample) -> Sample:
    return Sample(sample.input_ids[:ROW_TOKENS], sample.labels[:ROW_TOKENS], sample.source)
