"""The training loop: gradient source, quantizer, engine and optimizer are values of the run; none is named here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from signal import SIGTERM, Signals

import torch

from qaft.errors import DataError, TrainingError
from qaft.gradients.base import GradientEstimate
from qaft.train.checkpoint import latest_checkpoint
from qaft.train.closure import BatchClosure
from qaft.train.diagnostics import as_record, dead_zone_warning
from qaft.train.evaluation import evaluate
from qaft.train.objective import MicroBatch, noise_seed
from qaft.train.replay import record_of
from qaft.train.resume import save_state
from qaft.train.run import TrainRun, TrainState
from qaft.train.signals import StopSignals


def fit(run: TrainRun, state: TrainState) -> TrainState:
    """Train until ``train.steps`` steps are finished and return the final state; one iteration is one micro-batch.

    Args:
        run: what is trained; see ``TrainRun``.
        state: ``start_state(run)``.

    Raises:
        TrainingError: the loss or the gradient norm is not finite, or a checkpoint cannot be written.
        DataError: the data ended before the last step.
        SystemExit: SIGTERM (143) or SIGINT (130) came; the last finished step has been saved.
    """
    run.engine.module.train()
    run.log.start(state.step, state.tokens)
    state = state.taken(run.source, run.engine.device)
    with closing(run.log), StopSignals() as stop:
        for batch in _batches_until_done(run, state.step):
            estimate = run.source(_closure(run, state, batch), run.params)
            run.engine.backward(estimate.surrogate)
            state = state.accumulate(estimate.loss, batch.num_tokens)
            if run.engine.due:
                state = _finish_step(run, state, estimate, stop)
            if signal := _agreed_signal(run, stop):
                run.log.note(f"{signal.name}: saved {save_state(run, state)}; continue with train.resume=true")
                raise SystemExit(StopSignals.exit_code(signal))
    return state


def _batches_until_done(run: TrainRun, first_step: int) -> Iterator[MicroBatch]:
    expected = run.section.grad_accumulation * (run.section.steps - first_step)
    if expected <= 0:
        return
    given = 0
    for batch in run.batches.from_step(first_step):
        yield batch
        given += 1
        if given == expected:
            return
    done = first_step + given // run.section.grad_accumulation
    raise DataError(f"the training data ended after step {done} of {run.section.steps}; lower train.steps")


def _closure(run: TrainRun, state: TrainState, batch: MicroBatch) -> BatchClosure:
    return BatchClosure(
        objective=run.objective,
        engine=run.engine,
        batch=batch,
        noise_seed=noise_seed(run.section.seed, state.step, state.micro_batches, run.engine.rank),
        run_seed=run.section.seed,
        is_last=state.micro_batches == run.section.grad_accumulation - 1,
    )


def _finish_step(run: TrainRun, state: TrainState, estimate: GradientEstimate, stop: StopSignals) -> TrainState:
    assert state.loss is not None
    sums = run.engine.sum_over_ranks(torch.tensor([float(state.loss), state.step_tokens], dtype=torch.float64))
    loss, tokens = float(sums[0]) / run.engine.world_size, int(sums[1])
    rates = run.learning_rates()
    if not math.isfinite(loss):
        raise TrainingError(_diverged(run, state, f"the loss is {loss}"))
    info = run.engine.step()
    if not info.stepped:
        raise TrainingError(_diverged(run, state, f"the loss is {loss:.6g} but the gradient norm is {info.grad_norm}"))
    if run.journal is not None:
        run.journal.append(record_of(run, state.step, estimate.scalars, loss, tokens))
    run.scheduler.step()
    _reselect(run, state.step + 1, state.tokens + tokens)
    state = state.advance(loss, tokens).taken(run.source, run.engine.device)
    if _is_due(run, state, run.section.log_every):
        run.log.step(state.step, state.unlogged_losses, rates, info.grad_norm, state.tokens, estimate.metrics)
        _log_diagnostics(run, state)
        state = state.logged()
    with run.log.paused():
        if run.eval_batches is not None and _is_due(run, state, run.section.eval_every):
            eval_loss = evaluate(run.engine, run.eval_batches, interrupted=lambda: stop.received is not None)
            if eval_loss is not None:
                run.log.evaluation(state.step, eval_loss, state.tokens)
        if _is_due(run, state, run.section.save_every):
            save_state(run, state)
    return state


def _reselect(run: TrainRun, step: int, tokens: int) -> None:
    """Choose the rotations again when it is time; not after the last step, which no training would follow."""
    every = None if run.recipe.qat is None else run.recipe.qat.reselect_every
    if run.reselection is None or every is None or step % every or step == run.section.steps:
        return
    run.log.values(step, run.reselection(), tokens)


def _log_diagnostics(run: TrainRun, state: TrainState) -> None:
    if run.diagnostics is None:
        return
    layers, dead = run.diagnostics.measure(state.step)
    if layers:
        run.log.values(state.step, as_record(layers), state.tokens)
    if dead:
        run.log.note(dead_zone_warning(dead))


def _is_due(run: TrainRun, state: TrainState, every: int | None) -> bool:
    return state.step == run.section.steps or (every is not None and state.step % every == 0)


def _agreed_signal(run: TrainRun, stop: StopSignals) -> Signals | None:
    """Return the signal to stop for, if any rank has received one: all ranks must leave at the same micro-batch."""
    received = stop.received
    if run.engine.world_size > 1:
        votes = run.engine.sum_over_ranks(torch.tensor(0.0 if received is None else 1.0))
        received = (received or SIGTERM) if float(votes) > 0 else None
    return None if received is None else Signals(received)


def _diverged(run: TrainRun, state: TrainState, what: str) -> str:
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in run.learning_rates().items())
    last: Path | None = latest_checkpoint(run.folder)
    return (
        f"step {state.step + 1}: {what} (learning rate: {rates}). The parameters were not stepped; "
        f"last good checkpoint: {last or 'none'}. Look at the data of this step, or train again with a lower "
        "optim.lr, a longer optim.warmup or a smaller optim.clip in another train.output"
    )
