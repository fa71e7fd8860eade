from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from qaft.data.batches import Batch, EvalBatches, TrainBatches
from qaft.data.files import Provenance
from qaft.data.samples import IGNORE_INDEX, Sample
from qaft.errors import DataError, RecipeError

LENGTHS = [3, 9, 4, 12, 7, 5, 16, 2, 8, 6, 11]
Make = Callable[[Sequence[int]], list[Sample]]


def batches(samples: Sequence[Sample], **options: Any) -> TrainBatches:
    defaults = {"max_length": 16, "batch_size": 4, "grad_accumulation": 2, "steps": 5, "packing": True, "seed": 3}
    return TrainBatches(samples, **{**defaults, **options})


def content(batch: Batch) -> list[list[int]]:
    return batch.input_ids.tolist()


def same(a: Batch, b: Batch) -> bool:
    tensors = ("input_ids", "labels", "position_ids")
    numbers = (a.num_targets, a.num_tokens, a.step) == (b.num_targets, b.num_tokens, b.step)
    return numbers and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def trained(several: Iterable[Batch]) -> Counter[int]:
    labels = chain.from_iterable(batch.labels.flatten().tolist() for batch in several)
    return Counter(label for label in labels if label != IGNORE_INDEX)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("step", [0, 1, 3, 4, 5])
def test_a_resumed_run_sees_the_batches_of_a_run_that_never_stopped(
    numbered_samples: Make, packing: bool, step: int
) -> None:
    samples = numbered_samples(LENGTHS)
    whole = [batch for batch in batches(samples, packing=packing).from_step(0) if batch.step >= step]
    resumed = list(batches(samples, packing=packing).from_step(step))
    assert len(resumed) == len(whole) == (5 - step) * 2
    assert all(same(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_holds_every_sample_once_in_its_own_order(numbered_samples: Make, packing: bool) -> None:
    source = batches(numbered_samples(LENGTHS), packing=packing)
    epochs = [source.epoch_rows(epoch) for epoch in range(4)]
    assert all(sorted(chain.from_iterable(rows)) == list(range(len(LENGTHS))) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 4


@pytest.mark.parametrize("packing", [True, False])
def test_the_stream_of_rows_is_the_epochs_one_after_the_other(numbered_samples: Make, packing: bool) -> None:
    samples = numbered_samples(LENGTHS)
    source = batches(samples, packing=packing, batch_size=3, grad_accumulation=1, steps=20, pad_id=9999)
    epochs = [row for epoch in range(20) for row in source.epoch_rows(epoch)]
    seen = [
        [token // 100 for token, position in zip(ids, positions, strict=True) if position == 0 and token != 9999]
        for batch in source.from_step(0)
        for ids, positions in zip(batch.input_ids.tolist(), batch.position_ids.tolist(), strict=True)
    ]
    assert seen == [list(row) for row in epochs[:60]]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_all_world_sizes_see_the_same_global_batch(numbered_samples: Make, packing: bool, world_size: int) -> None:
    samples = numbered_samples(LENGTHS)
    alone = list(batches(samples, packing=packing).from_step(0))
    ranks = [
        list(batches(samples, packing=packing, rank=rank, world_size=world_size).from_step(0))
        for rank in range(world_size)
    ]
    for number, batch in enumerate(alone):
        shares = [rank[number] for rank in ranks]
        assert [row for share in shares for row in content(share)] == content(batch)
        assert {share.num_targets for share in shares} == {batch.num_targets}
        assert sum(share.num_tokens for share in shares) == batch.num_tokens


@pytest.mark.parametrize("packing", [True, False])
def test_one_step_has_the_same_content_however_it_is_accumulated(numbered_samples: Make, packing: bool) -> None:
    samples = numbered_samples(LENGTHS)
    for batch_size, accumulation in [(8, 1), (4, 2), (1, 8)]:
        steps = list(
            batches(samples, packing=packing, batch_size=batch_size, grad_accumulation=accumulation).from_step(0)
        )
        reference = list(batches(samples, packing=packing, batch_size=2, grad_accumulation=4).from_step(0))
        for step in range(5):
            mine = [batch for batch in steps if batch.step == step]
            theirs = [batch for batch in reference if batch.step == step]
            assert trained(mine) == trained(theirs)
            assert mine[0].num_targets == theirs[0].num_targets
            assert sum(batch.num_tokens for batch in mine) == sum(batch.num_tokens for batch in theirs)


@pytest.mark.parametrize("packing", [True, False])
def test_the_normaliser_counts_exactly_the_shifted_labels_of_the_whole_step(
    numbered_samples: Make, packing: bool
) -> None:
    ranks = [
        list(batches(numbered_samples(LENGTHS), packing=packing, rank=rank, world_size=2).from_step(0))
        for rank in range(2)
    ]
    for step in range(5):
        parts = [batch for rank in ranks for batch in rank if batch.step == step]
        shifted = sum(int((batch.labels[:, 1:] != IGNORE_INDEX).sum()) for batch in parts)
        assert {batch.num_targets for batch in parts} == {shifted}


def test_no_label_is_predicted_from_the_sample_before(numbered_samples: Make) -> None:
    for batch in batches(numbered_samples(LENGTHS)).from_step(0):
        assert (batch.labels[batch.position_ids == 0] == IGNORE_INDEX).all()


def test_tokens_count_no_padding(numbered_samples: Make) -> None:
    source = batches(numbered_samples(LENGTHS), pad_id=9999)
    assert all(batch.num_tokens == int((batch.input_ids != 9999).sum()) for batch in source.from_step(0))


def test_a_pad_id_equal_to_eos_leaves_the_eos_labels(numbered_samples: Make) -> None:
    eos = 2
    ids = np.array([5, 6, eos], dtype=np.int32)
    samples = [Sample(ids, ids, Provenance("a", 1))] * 4
    (batch,) = batches(samples, packing=False, grad_accumulation=1, steps=1, pad_id=eos).from_step(0)
    assert batch.labels.tolist() == [[IGNORE_INDEX, 6, eos, *[IGNORE_INDEX] * 5]] * 4
    assert batch.num_targets == 8


def test_another_seed_gives_another_order_and_a_negative_seed_is_one(numbered_samples: Make) -> None:
    orders = {tuple(batches(numbered_samples(LENGTHS), seed=seed).epoch_rows(0)) for seed in (-1, 0, 1)}
    assert len(orders) == 3


def test_the_inputs_of_the_model_switch_its_cache_off(numbered_samples: Make) -> None:
    batch = next(batches(numbered_samples(LENGTHS)).from_step(0))
    inputs = batch.to("cpu").inputs()
    assert inputs["use_cache"] is False
    assert inputs["attention_mask"] is None
    assert torch.equal(inputs["position_ids"], batch.position_ids)


@pytest.mark.parametrize("make", [batches, EvalBatches])
def test_a_batch_size_that_the_processes_cannot_share_is_refused(numbered_samples: Make, make: Any) -> None:
    with pytest.raises(RecipeError, match=r"train.batch_size=4 .* multiple of 3; set it to 6"):
        make(numbered_samples(LENGTHS), max_length=16, batch_size=4, world_size=3)


@pytest.mark.parametrize("make", [batches, EvalBatches])
def test_samples_that_do_not_fit_or_are_not_there_are_refused(numbered_samples: Make, make: Any) -> None:
    with pytest.raises(DataError, match="numbered, line 2: a sample of 17 tokens does not fit into 16"):
        make(numbered_samples([3, 17]), max_length=16, batch_size=4)
    with pytest.raises(DataError, match="no sample"):
        make([], max_length=16, batch_size=4)


def test_evaluation_sees_every_sample_once_in_order_and_a_smaller_last_batch(numbered_samples: Make) -> None:
    source = EvalBatches(numbered_samples(LENGTHS), max_length=16, batch_size=4, pad_id=9999)
    seen = list(source)
    assert [len(batch.input_ids) for batch in seen] == [4, 4, 3]
    assert len(source) == 3
    assert [ids[0] // 100 for batch in seen for ids in content(batch)] == list(range(len(LENGTHS)))
    assert sum(batch.num_tokens for batch in seen) == sum(LENGTHS)
    assert all(batch.num_targets == int((batch.labels[:, 1:] != IGNORE_INDEX).sum()) for batch in seen)


def test_every_rank_yields_as_many_evaluation_batches_and_together_they_hold_each_sample_once(
    numbered_samples: Make,
) -> None:
    samples = numbered_samples(LENGTHS[:9])
    ranks = [list(EvalBatches(samples, max_length=16, batch_size=4, rank=rank, world_size=4)) for rank in range(4)]
    assert [len(rank) for rank in ranks] == [3] * 4
    assert sum(batch.num_tokens for rank in ranks for batch in rank) == sum(LENGTHS[:9])
    whole = trained(EvalBatches(samples, max_length=16, batch_size=4))
    assert trained(batch for rank in ranks for batch in rank) == whole
    assert {rank[2].num_targets for rank in ranks} == {samples[8].num_targets}
