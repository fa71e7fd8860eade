"""Several samples in one row, without attention between them.

A row is its samples one after the other, with position_ids that restart at 0 for each and no attention mask.
transformers reads the borders from these positions and builds the block-diagonal causal mask that belongs to the model
(a sliding window stays one), for any number of rows, on sdpa, eager and flex attention. It does so only without a cache
(``past_key_values`` is None) and without a mask: the model has to be called with ``use_cache=False``, see
``Batch.inputs``; where the flag is forgotten, samples see each other and the loss still falls. Flash attention reads
positions only when the batch has one row. ``isolation.py`` checks the model itself.
Source: transformers 5.23, masking_utils.py (_preprocess_mask_arguments, find_packed_sequence_indices) and
modeling_flash_attention_utils.py (_is_packed_sequence).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qaft.data.samples import IGNORE_INDEX, Sample

OPEN_ROWS = 64
"""Rows that still take samples while packing."""

LENGTH_MULTIPLE = 8
"""Row lengths are rounded up to it: matrix kernels of half precision want 16 bytes."""


def pack(lengths: Sequence[int], order: Sequence[int], max_length: int) -> list[tuple[int, ...]]:
    """Return rows of sample indices, each at most ``max_length`` tokens, every index of ``order`` exactly once.

    First fit over the OPEN_ROWS youngest rows, in the given order; rows are in the order of their first sample. Sorting
    by length first would fill rows a little better, but put samples of one length together and so undo the shuffle;
    with the window a sample moves by less than OPEN_ROWS rows.

    Args:
        lengths: tokens of each sample.
        order: sample indices in the order of the epoch.
        max_length: tokens per row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        length = lengths[index]
        first = max(0, len(rows) - OPEN_ROWS)
        fitting = next((row for row in range(first, len(rows)) if room[row] >= length), None)
        if fitting is None:
            rows.append([index])
            room.append(max_length - length)
        else:
            rows[fitting].append(index)
            room[fitting] -= length
    return [tuple(row) for row in rows]


def padded_length(rows: Sequence[Sequence[int]], lengths: Sequence[int], max_length: int) -> int:
    """Return the common length of rows: that of the longest, rounded up to LENGTH_MULTIPLE, at most ``max_length``."""
    longest = max(sum(lengths[index] for index in row) for row in rows)
    return min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, max_length)


def collate(rows: Sequence[Sequence[Sample]], length: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return input_ids, labels and position_ids of the rows, each int64 [rows, length].

    Padding is at the end and known by its place, never by its token: its labels are IGNORE_INDEX, and a ``pad_id`` that
    is also the EOS token of the samples changes none of theirs. It is a segment of its own, except where no row holds
    two samples: there it continues the positions, so that transformers needs no mask at all (causal attention never
    looks to the right) and the fast causal kernel runs.

    Args:
        rows: samples of each row, possibly none.
        length: T, at least the tokens of each row.
        pad_id: any id of the vocabulary.
    """
    input_ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORE_INDEX, dtype=np.int64)
    position_ids = np.tile(np.arange(length), (len(rows), 1))
    is_packed = any(len(row) > 1 for row in rows)
    for index, row in enumerate(rows):
        begin = 0
        for sample in row:
            end = begin + len(sample)
            input_ids[index, begin:end] = sample.input_ids
            labels[index, begin:end] = sample.labels
            position_ids[index, begin:end] -= begin
            begin = end
        if is_packed:
            position_ids[index, begin:] -= begin
    return torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(position_ids)
