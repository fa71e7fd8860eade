from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import SignalBatches, TinyBatches, TinyCausalLM, make_run, values

from qaft.data.batches import Batch
from qaft.errors import DataError, TrainingError
from qaft.gradients.base import GradientEstimate
from qaft.train.checkpoint import latest_checkpoint
from qaft.train.loop import fit
from qaft.train.resume import start_state
from qaft.train.run import TrainRun, TrainState


def train(folder: Path, **options: Any) -> TrainRun:
    run = make_run(folder, **options)
    fit(run, start_state(run))
    return run


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_parameters(left: TrainRun, right: TrainRun, *, tolerance: float = 0.0) -> None:
    ours, theirs = values(left), values(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance)


def test_loop_fits_on_one_screen() -> None:
    source = inspect.getsource(fit)
    body = source.split('"""')[2].strip().splitlines()
    assert len(body) <= 25


@pytest.mark.parametrize(
    "optim", [{"name": "sgd", "lr": 0.5}, {"name": "sgd", "lr": 0.5, "momentum": 0.9}, {"name": "adamw"}]
)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_one_batch_of_eight_equals_eight_of_one(tmp_path: Path, optim: dict[str, Any], clip: float | None) -> None:
    def regularizer(layers: Any) -> torch.Tensor:
        return 0.1 * layers["model.q_proj"].weight.square().sum()

    options = {"rows": 8, "steps": 5, "optim": {**optim, "clip": clip}, "regularizers": (regularizer,)}
    one = train(tmp_path / "one", **options)
    eight = train(tmp_path / "eight", grad_accumulation=8, **options)
    # Adam divides by sqrt(v): rounding of the smallest gradients is enlarged.
    assert_same_parameters(one, eight, tolerance=1e-6 if optim["name"] == "sgd" else 1e-5)
    for left, right in zip(records(tmp_path / "one"), records(tmp_path / "eight"), strict=True):
        for key in ("loss", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=2e-6)
        assert left["tokens"] == right["tokens"]
    assert clip is None or any(record["grad_norm"] > clip for record in records(tmp_path / "one"))


def test_steps_equal_a_plain_torch_loop_over_the_full_logits(tmp_path: Path) -> None:
    run = train(tmp_path, steps=4, optim={"name": "adamw", "lr": 0.01, "clip": 0.5})
    model = TinyCausalLM()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=0.01, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    losses = []
    for batch in TinyBatches(steps=4).from_step(0):
        logits = model.lm_head(model.model(batch.input_ids).last_hidden_state)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    for expected, param in zip(params, run.params.values(), strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=1e-6)
    assert [record["loss"] for record in records(tmp_path)] == pytest.approx(losses, rel=1e-5)


def test_metrics_have_a_line_per_interval_and_per_evaluation(tmp_path: Path) -> None:
    batches = list(TinyBatches(steps=2).from_step(0))
    train(tmp_path, steps=5, log_every=2, eval_every=2, eval_batches=batches, optim={"lr": 0.5, "schedule": "linear"})
    lines = records(tmp_path)
    assert [(line["step"], "eval_loss" in line) for line in lines] == [
        (2, False), (2, True), (4, False), (4, True), (5, False), (5, True)
    ]  # fmt: skip
    training = [line for line in lines if "loss" in line]
    assert [line["learning_rate"] for line in training] == pytest.approx([0.4, 0.2, 0.1])
    assert [line["tokens"] for line in training] == [2 * 24, 4 * 24, 5 * 24]
    expected = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_memory_gib", "time"}
    assert all(line.keys() == expected for line in training)


def test_logged_loss_is_the_mean_over_the_window(tmp_path: Path) -> None:
    train(tmp_path / "each", steps=4)
    train(tmp_path / "pairs", steps=4, log_every=2)
    each, pairs = ([line["loss"] for line in records(tmp_path / part)] for part in ("each", "pairs"))
    assert pairs == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2], rel=1e-6)


def test_last_step_evaluates_and_saves_without_intervals(tmp_path: Path) -> None:
    batches = list(TinyBatches(steps=1).from_step(0))
    train(tmp_path, steps=3, eval_batches=batches)
    assert [line["step"] for line in records(tmp_path) if "eval_loss" in line] == [3]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_dropout_is_on_in_training_and_its_noise_depends_on_the_seed(tmp_path: Path) -> None:
    runs = [
        train(tmp_path / str(i), steps=2, model=TinyCausalLM(dropout=0.5), seed=seed)
        for i, seed in enumerate([0, 0, 1])
    ]
    assert_same_parameters(runs[0], runs[1])
    with pytest.raises(AssertionError):
        assert_same_parameters(runs[0], runs[2])


class NanSource:
    """Backprop, but the loss of one call is replaced."""

    needs_backward = True

    def __init__(self, bad_call: int, value: float) -> None:
        self.call, self.bad_call, self.value = 0, bad_call, value
        self.params_at_bad_call: list[torch.Tensor] = []

    def __call__(self, closure: Any, params: Any) -> GradientEstimate:
        loss = closure()
        self.call += 1
        if self.call == self.bad_call:
            loss = loss * self.value
            self.params_at_bad_call = [param.detach().clone() for param in params.values()]
        return GradientEstimate(loss, loss.detach())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("bad_call", [7, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path, bad_call: int, value: float) -> None:
    source = NanSource(bad_call, value)
    run = make_run(tmp_path, steps=9, grad_accumulation=2, save_every=2, source=source)
    with pytest.raises(TrainingError) as caught:
        fit(run, start_state(run))
    message = str(caught.value)
    for part in (f"step 4: the loss is {value}", "learning rate: base 0.00", "checkpoint-2", "not stepped", "optim.lr"):
        assert part in message
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3]
    assert "gradient norm" not in message
    assert all(torch.equal(a, b) for a, b in zip(source.params_at_bad_call, run.params.values(), strict=True))
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    class InfiniteGradient(NanSource):
        def __call__(self, closure: Any, params: Any) -> GradientEstimate:
            loss = closure()
            return GradientEstimate(loss * 3e38 * 3e38, loss.detach())

    run = make_run(tmp_path, steps=2, source=InfiniteGradient(0, 0))
    before = values(run)
    with pytest.raises(
        TrainingError, match=r"step 1: the loss is \d.* but the gradient norm is (inf|nan).*checkpoint: none"
    ):
        fit(run, start_state(run))
    assert all(torch.equal(before[name], param) for name, param in run.params.items())


def test_data_that_ends_early_is_an_error_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=9, save_every=2, batches=TinyBatches(steps=5))
    with pytest.raises(DataError, match=r"ended after step 5 of 9; lower train\.steps"):
        fit(run, start_state(run))
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_endless_data_stops_at_the_last_step_and_a_finished_run_does_nothing(tmp_path: Path) -> None:
    run = train(tmp_path, steps=3, batches=TinyBatches(steps=10**9))
    before = values(run)
    again = make_run(tmp_path, steps=3, batches=TinyBatches(steps=10**9), resume=True)
    assert fit(again, start_state(again)).step == 3
    assert all(torch.equal(before[name], param) for name, param in again.params.items())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(("at", "finished"), [(1, 0), (5, 2), (6, 3)])
def test_signal_inside_a_step_saves_the_last_finished_step_and_resumes_exactly(
    tmp_path: Path, number: int, code: int, at: int, finished: int
) -> None:
    options = {"steps": 5, "grad_accumulation": 2, "optim": {"name": "sgd", "momentum": 0.9}}
    whole = train(tmp_path / "whole", model=TinyCausalLM(dropout=0.3), **options)
    batches = SignalBatches(number=number, at=at, steps=5, accumulation=2)
    run = make_run(tmp_path / "parts", model=TinyCausalLM(dropout=0.3), batches=batches, **options)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as caught:
        fit(run, start_state(run))
    assert caught.value.code == code
    assert latest_checkpoint(tmp_path / "parts") == tmp_path / "parts" / f"checkpoint-{finished}"
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    resumed = train(tmp_path / "parts", model=TinyCausalLM(dropout=0.3), resume=True, **options)
    assert_same_parameters(resumed, whole)


def test_signal_during_an_evaluation_does_not_wait_for_its_end(tmp_path: Path) -> None:
    batches = list(TinyBatches(steps=50).from_step(0))
    seen = 0

    class Evaluation:
        def __iter__(self) -> Iterator[Batch]:
            nonlocal seen
            for seen, batch in enumerate(batches, start=1):
                if seen == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    run = make_run(tmp_path, steps=8, eval_every=2, eval_batches=Evaluation())
    with pytest.raises(SystemExit):
        fit(run, start_state(run))
    assert seen == 3
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not any("eval_loss" in line for line in records(tmp_path))


def start_process(folder: Path, steps: int) -> subprocess.Popen[bytes]:
    """Start the run of ``tiny_run.py``, which is slow after ``steps`` steps, and return when these are logged."""
    command = [sys.executable, tiny_run.__file__, str(folder), str(steps)]
    process = subprocess.Popen(command, env=tiny_run.ENVIRONMENT)
    while not (folder / "metrics.jsonl").exists() or len(records(folder)) < steps:
        assert process.poll() is None
        time.sleep(0.05)
    return process


def test_process_that_is_terminated_and_then_killed_resumes_to_the_same_model(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", steps=tiny_run.SLOW_STEPS)
    folder = tmp_path / "parts"
    process = start_process(folder, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    saved = latest_checkpoint(folder)
    assert saved == folder / f"checkpoint-{records(folder)[-1]['step']}"
    process = start_process(folder, 9)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    resumed = train(folder, steps=tiny_run.SLOW_STEPS, save_every=2, resume=True)
    assert_same_parameters(resumed, whole)
    assert [line["step"] for line in records(folder)] == list(range(1, tiny_run.SLOW_STEPS + 1))


def test_state_counts_a_micro_batch_and_starts_the_next_step_clean() -> None:
    state = TrainState().accumulate(torch.tensor(1.0), 10).accumulate(torch.tensor(2.0), 5)
    assert (state.micro_batches, float(state.loss or 0), state.step_tokens) == (2, 3.0, 15)
    after = state.advance(3.0, 15)
    assert (after.step, after.tokens, after.unlogged_losses, after.micro_batches, after.loss) == (
        1,
        15,
        (3.0,),
        0,
        None,
    )
