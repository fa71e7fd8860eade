from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import TinyBatches, TinyCausalLM, make_run

from qaft.errors import DataError
from qaft.train.evaluation import evaluate


def test_mean_is_over_targets_and_does_not_depend_on_how_rows_are_batched(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    batches = list(TinyBatches(steps=3).from_step(0))
    total = sum(run.engine.module(b.input_ids, b.labels).item() for b in batches)
    targets = sum(int((b.labels[:, 1:] != -100).sum()) for b in batches)
    whole = evaluate(run.engine, batches)
    assert whole == pytest.approx(total / targets, rel=1e-6)
    assert evaluate(run.engine, TinyBatches(steps=3, accumulation=4).from_step(0)) == pytest.approx(whole, rel=1e-6)


def test_evaluation_has_no_dropout_and_returns_to_training_mode(tmp_path: Path) -> None:
    model = TinyCausalLM(dropout=0.9)
    run = make_run(tmp_path, model=model)
    run.engine.module.train()
    batches = list(TinyBatches(steps=1).from_step(0))
    assert evaluate(run.engine, batches) == evaluate(run.engine, batches)
    assert run.engine.module.training and model.model.dropout.training
    assert all(p.grad is None for p in run.params.values())


def test_training_mode_comes_back_when_a_batch_fails(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(AttributeError):
        evaluate(run.engine, [None])  # type: ignore[list-item]
    assert run.engine.module.training


def test_interrupted_evaluation_has_no_result(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    asked = iter([False, True])
    assert evaluate(run.engine, TinyBatches(steps=3).from_step(0), interrupted=lambda: next(asked)) is None


def test_nothing_to_evaluate_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    batches = [replace(b, labels=torch.full_like(b.labels, -100)) for b in TinyBatches(steps=2).from_step(0)]
    with pytest.raises(DataError, match=r"data.valid: no position carries loss"):
        evaluate(run.engine, batches)
