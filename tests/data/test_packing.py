from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qaft.data.batches import Batch, make_batch
from qaft.data.files import Provenance
from qaft.data.packing import OPEN_ROWS, collate, pack, padded_length
from qaft.data.samples import IGNORE_INDEX, Sample

VOCABULARY = 64
Make = Callable[[Sequence[int]], list[Sample]]


def llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        attn_implementation=attention,
        use_cache=True,
    )
    return LlamaForCausalLM(config).eval()


def random_sample(length: int, seed: int) -> Sample:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, length, dtype=np.int32)
    return Sample(ids, ids, Provenance("random", seed + 1))


def batch_of(rows: Sequence[Sequence[Sample]], length: int) -> Batch:
    return make_batch(rows, length, pad_id=0, num_targets=1, step=0)


@torch.no_grad()
def logits(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    return model(**batch.inputs()).logits


@given(st.lists(st.integers(1, 20), min_size=1, max_size=200), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_packing_keeps_every_sample_once_and_no_row_too_long(lengths: list[int], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    rows = pack(lengths, order, max_length=20)
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
    assert [row[0] for row in rows] == [i for i in order if i in {row[0] for row in rows}]


def test_packing_is_first_fit_in_the_given_order() -> None:
    assert pack([6, 5, 4, 3, 2], [0, 1, 2, 3, 4], max_length=10) == [(0, 2), (1, 3, 4)]
    assert pack([6, 5, 4, 3, 2], [4, 3, 2, 1, 0], max_length=10) == [(4, 3, 2), (1,), (0,)]


def test_a_row_takes_no_sample_that_comes_more_than_the_window_later() -> None:
    lengths = [6] * (OPEN_ROWS + 1) + [4]
    rows = pack(lengths, range(len(lengths)), max_length=10)
    assert rows[0] == (0,)
    assert rows[1] == (1, OPEN_ROWS + 1)


@pytest.mark.parametrize(("rows", "expected"), [([(0,)], 8), ([(0, 1)], 16), ([(2,)], 20), ([(0,), (1,)], 8)])
def test_rows_are_as_long_as_the_longest_rounded_up_to_eight(rows: list[tuple[int, ...]], expected: int) -> None:
    assert padded_length(rows, [3, 8, 19], max_length=20) == expected


def test_a_packed_row_has_positions_from_zero_in_every_sample_and_in_the_padding(numbered_samples: Make) -> None:
    samples = numbered_samples([3, 2, 4])
    input_ids, labels, position_ids = collate([samples[:2], samples[2:]], 8, pad_id=7)
    assert input_ids.tolist() == [[0, 1, 2, 100, 101, 7, 7, 7], [200, 201, 202, 203, 7, 7, 7, 7]]
    assert position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    i = IGNORE_INDEX
    assert labels.tolist() == [[i, 1, 2, i, 101, i, i, i], [i, 201, 202, 203, i, i, i, i]]


def test_rows_of_one_sample_need_no_mask_so_their_positions_run_on(numbered_samples: Make) -> None:
    _, _, position_ids = collate([[sample] for sample in numbered_samples([3, 5])], 8, pad_id=0)
    assert position_ids.tolist() == [list(range(8))] * 2


def test_padding_is_known_by_its_place_and_not_by_its_token() -> None:
    eos = 2
    ids = np.array([5, 6, eos, 7, eos], dtype=np.int32)
    _, labels, _ = collate([[Sample(ids, ids, Provenance("a", 1))]], 8, pad_id=eos)
    assert labels.tolist() == [[IGNORE_INDEX, 6, eos, 7, eos, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_packed_sample_does_not_see_the_one_before_it(attention: str, num_rows: int) -> None:
    model = llama(attention)
    second = [random_sample(6 + row, seed=row) for row in range(num_rows)]
    first = [random_sample(5, seed=10 + row) for row in range(num_rows)]
    other = [random_sample(5, seed=20 + row) for row in range(num_rows)]
    packed = logits(model, batch_of([[a, b] for a, b in zip(first, second, strict=True)], 16))
    changed = logits(model, batch_of([[a, b] for a, b in zip(other, second, strict=True)], 16))
    assert not torch.equal(packed[:, :5], changed[:, :5])
    for row, sample in enumerate(second):
        span = slice(5, 5 + len(sample))
        assert torch.equal(packed[row, span], changed[row, span])
        alone = logits(model, batch_of([[sample]], len(sample)))
        torch.testing.assert_close(packed[row, span], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_sample_does_not_see_padding(attention: str, packed: bool) -> None:
    model = llama(attention)
    rows = [[random_sample(5, 0), random_sample(3, 1)] if packed else [random_sample(5, 0)], [random_sample(4, 2)]]
    zeros = make_batch(rows, 16, pad_id=0, num_targets=1, step=0)
    nines = make_batch(rows, 16, pad_id=9, num_targets=1, step=0)
    ones, others = logits(model, zeros), logits(model, nines)
    for row, samples in enumerate(rows):
        end = sum(len(sample) for sample in samples)
        assert torch.equal(ones[row, :end], others[row, :end])


def test_the_gradient_of_a_packed_row_is_that_of_its_samples() -> None:
    model = llama("sdpa")
    samples = [random_sample(5, 0), random_sample(7, 1), random_sample(4, 2)]

    def gradient(batches: list[Batch]) -> Tensor:
        model.zero_grad()
        for batch in batches:
            scores = model(**batch.inputs()).logits[:, :-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(scores, batch.labels[:, 1:].flatten(), reduction="sum").backward()
        weight = model.model.layers[0].self_attn.k_proj.weight
        assert weight.grad is not None
        return weight.grad.clone()

    together = gradient([batch_of([samples[:2], samples[2:]], 16)])
    apart = gradient([batch_of([[sample]], len(sample)) for sample in samples])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
