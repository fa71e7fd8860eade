from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_run import TinyBatches, TinyCausalLM, make_run
from torch import Tensor

from qaft.errors import DataError
from qaft.train.objective import Objective, local_targets, noise_seed, seeded


def first_batch(**options: Any) -> Any:
    return next(iter(TinyBatches(steps=1, **options).from_step(0)))


def test_value_is_the_sum_of_losses_over_the_targets_of_the_step(tmp_path: Any) -> None:
    run = make_run(tmp_path)
    batch = replace(first_batch(), num_targets=1000)
    total = run.engine.module(batch.input_ids, batch.labels)
    torch.testing.assert_close(run.objective(run.engine, batch, seed=0), total / 1000)


def test_regularizers_count_once_per_step_whatever_the_split(tmp_path: Any) -> None:
    def penalty(layers: Any) -> Tensor:
        return 0.25 * layers["model.v_proj"].weight.square().sum()

    run = make_run(tmp_path, regularizers=(penalty, penalty))
    plain = Objective()
    expected = 2 * penalty(run.objective.layers)
    for accumulation in (1, 2, 4):
        batches = list(TinyBatches(steps=1, accumulation=accumulation).from_step(0))
        difference = sum(run.objective(run.engine, b, seed=0) - plain(run.engine, b, seed=0) for b in batches)
        torch.testing.assert_close(difference, expected)


def test_equal_theta_and_seed_give_an_equal_value_under_dropout(tmp_path: Any) -> None:
    run = make_run(tmp_path, model=TinyCausalLM(dropout=0.5))
    run.engine.module.train()
    batch = first_batch()
    value = run.objective(run.engine, batch, seed=3)
    torch.rand(5)
    assert run.objective(run.engine, batch, seed=3) == value
    assert run.objective(run.engine, batch, seed=4) != value


def test_closure_leaves_the_global_generator_as_it_was(tmp_path: Any) -> None:
    run = make_run(tmp_path, model=TinyCausalLM(dropout=0.5))
    before = torch.get_rng_state()
    run.objective(run.engine, first_batch(), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_generator_comes_back_when_the_block_fails() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError), seeded(1, torch.device("cpu")):
        torch.rand(1)
        raise ValueError
    assert torch.equal(torch.get_rng_state(), before)


def test_whoever_acts_on_some_steps_only_is_told_the_step_before_the_forward_pass(tmp_path: Any) -> None:
    run, told = make_run(tmp_path), []
    objective = Objective(on_step=told.append)
    run.engine.module.register_forward_pre_hook(lambda *_: told.append("forward"))
    objective(run.engine, replace(first_batch(), step=7), seed=0)
    assert told == [7, "forward"]


def test_step_without_targets_is_an_error_that_names_the_step(tmp_path: Any) -> None:
    run = make_run(tmp_path)
    with pytest.raises(DataError, match=r"step 0: no position carries loss.*data.train_on"):
        run.objective(run.engine, replace(first_batch(), num_targets=0), seed=0)


def test_local_targets_counts_shifted_labels() -> None:
    batch = first_batch()
    labels = torch.full_like(batch.labels, -100)
    labels[0, 0] = 1  # nothing predicts the first token
    labels[1, 3] = 1
    assert local_targets(replace(batch, labels=labels)) == 1


def test_noise_seeds_differ_in_every_part_and_are_stable() -> None:
    seeds = {noise_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert noise_seed(1, 23) != noise_seed(12, 3)
    # Pinned: a resumed run must draw the same noise in another process and another version.
    assert noise_seed(0, 0, 0, 0) == 3798811674703423765
