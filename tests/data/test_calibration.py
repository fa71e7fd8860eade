from __future__ import annotations

import numpy as np
import pytest

from qaft.data.calibration import ROW_TOKENS, calibration_of
from qaft.data.files import Provenance
from qaft.data.samples import Sample
from qaft.errors import DataError


def _sample(begin: int, length: int) -> Sample:
    ids = np.arange(begin, begin + length)
    return Sample(ids, ids, Provenance("test", begin))


def test_real_tokens_are_exactly_those_of_the_samples() -> None:
    samples = [_sample(1000 * i, 50 + 7 * i) for i in range(12)]
    batch = calibration_of(samples, tokens=10_000, seed=3)
    assert sorted(batch.input_ids[batch.real].tolist()) == sorted(t for s in samples for t in s.input_ids.tolist())
    assert int(batch.real.sum()) == sum(map(len, samples))


def test_positions_begin_anew_in_every_sample() -> None:
    samples = [_sample(1000 * i, 50 + 7 * i) for i in range(12)]
    batch = calibration_of(samples, tokens=10_000, seed=3)
    starts = batch.input_ids[batch.real & (batch.position_ids == 0)]
    assert sorted(starts.tolist()) == [1000 * i for i in range(12)]


def test_no_more_samples_are_taken_than_the_tokens_need() -> None:
    samples = [_sample(100 * i, 40) for i in range(50)]
    assert int(calibration_of(samples, tokens=100, seed=0).real.sum()) == 120


def test_a_long_sample_is_cut() -> None:
    assert calibration_of([_sample(0, 3 * ROW_TOKENS)], tokens=10, seed=0).input_ids.shape == (1, ROW_TOKENS)


def test_the_seed_draws_the_samples() -> None:
    samples = [_sample(100 * i, 40) for i in range(50)]
    first, again, other = (calibration_of(samples, tokens=100, seed=seed).input_ids for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)


def test_no_sample_is_refused() -> None:
    with pytest.raises(DataError, match="no sample to calibrate on"):
        calibration_of([], tokens=10, seed=0)
