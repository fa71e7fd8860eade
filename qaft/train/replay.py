"""Optimizer steps from a journal: the same surrogates, optimizer and schedule, without data or a forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qaft.errors import IncompatibleError, TrainingError
from qaft.gradients.epsilon import Epsilon
from qaft.gradients.two_point import TwoPointSource
from qaft.train.closure import gathered
from qaft.train.journal import JournalFile, Record, parameters_digest, read_journal
from qaft.train.run import TrainRun, TrainState


def record_of(run: TrainRun, step: int, scalars: tuple[float, ...], loss: float, tokens: int) -> Record:
    """Return what a journal holds of a step; called before the schedule moves on."""
    epsilon = two_point(run).epsilon
    assert epsilon is not None
    ratio = epsilon.ratio if math.isfinite(epsilon.ratio) else None
    return Record(
        step=step,
        c=scalars,
        epsilon=epsilon.value,
        ratio=ratio,
        rates=run.learning_rates(),
        loss=loss,
        tokens=tokens,
    )


def two_point(run: TrainRun) -> TwoPointSource:
    """Return the run's source, which a journal can repeat."""
    assert isinstance(run.source, TwoPointSource)
    return run.source


def replay(run: TrainRun, state: TrainState, records: Sequence[Record]) -> TrainState:
    """Take the steps of ``records``, which follow ``state``, and return where they lead.

    Raises:
        TrainingError: a record does not fit: its learning rates are not those of the recipe.
    """
    source = two_point(run)
    for record in records:
        assert record.step == state.step
        if run.learning_rates() != dict(record.rates):
            raise TrainingError(
                f"step {record.step} was taken with learning rates {dict(record.rates)}, the recipe gives "
                f"{run.learning_rates()}; replay with the version of qaft and torch that wrote the journal"
            )
        source.epsilon = Epsilon(record.epsilon, math.inf if record.ratio is None else record.ratio)
        run.engine.backward(source.surrogate(run.params, seed=run.section.seed, step=record.step, scalars=record.c))
        run.engine.step()
        run.scheduler.step()
        state = state.advance(record.loss, record.tokens)
        if state.step % run.section.log_every == 0:
            state = state.logged()
    return state.taken(run.source, run.engine.device)


def check_base(file: JournalFile, base: str, place: object) -> None:
    """Refuse a journal of another base.

    Raises:
        IncompatibleError: the frozen weights are not those that the journal started from.
    """
    if file.header.base != base:
        raise IncompatibleError(
            f"{place}: the journal was written on a base with digest {file.header.base[:16]}, "
            f"this one has {base[:16]}: other weights, another storage or another selection; "
            "give the base that the run was trained on"
        )


def continue_journal(run: TrainRun, state: TrainState) -> TrainState:
    """Replay what the journal holds after ``state``, and leave the journal ready for the next step.

    Raises:
        IncompatibleError: see ``check_base``.
    """
    journal = run.journal
    assert journal is not None
    file = read_journal(journal.path) if journal.path.exists() else None
    # Rank 0 writes what the others have just looked for: here, and in ``start_state``.
    run.engine.wait()
    if file is None:
        journal.begin(state.step)
        return state
    check_base(file, journal.base, journal.path)
    reached = file.header.start + len(file.records)
    if file.problem is not None:
        run.log.note(f"{file.problem}; it and what follows it are dropped")
    if reached < state.step:
        run.log.note(f"{journal.path} ends at step {reached}, before the checkpoint: a new one starts there")
        journal.begin(state.step)
        return state
    state = replay(run, state, file.records[state.step - file.header.start :])
    journal.keep(file.lines)
    return state


def check_parameters(run: TrainRun, step: int) -> None:
    """Write the hash of the trained parameters into the journal, once all ranks agree on it; collective.

    Raises:
        TrainingError: a rank holds other parameters than rank 0.
    """
    assert run.journal is not None
    digest = parameters_digest(run.params)
    words = [float(int(digest[start : start + 8], 16)) for start in (0, 8)]
    rows = gathered(run.engine, words)
    if others := [rank for rank, row in enumerate(rows) if row != rows[0]]:
        raise TrainingError(
            f"after step {step} rank {others[0]} holds other parameters than rank 0: its machine computes differently; "
            "start again from the last checkpoint with train.resume=true"
        )
    run.journal.check(step, digest)
