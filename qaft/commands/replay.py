"""``qaft replay``: the trained parameters from a journal and the base, without data and without a forward pass."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace as with_changes
from pathlib import Path

from rich.console import Console

from qaft.build import build_run
from qaft.errors import RecipeError, TrainingError
from qaft.recipe import Recipe, parse_recipe, save_recipe
from qaft.train.journal import JOURNAL, JournalFile, parameters_digest, read_journal
from qaft.train.replay import check_base, replay
from qaft.train.resume import restore, save_state
from qaft.train.run import TrainState
from qaft.training import prepare_replay


def replay_journal(
    journal: Path,
    *,
    base: str,
    out: Path,
    until: int | None = None,
    snapshot: Path | None = None,
    shuffle: int | None = None,
    console: Console | None = None,
) -> Path:
    """Rebuild the parameters after ``until`` steps as a run folder, check every hash on the way, and return it.

    Args:
        journal: a journal, or the run folder that holds it.
        base: folder or id of the base model.
        out: a new run folder: it can be exported, evaluated, compared and continued.
        until: steps; default: all that the journal holds.
        snapshot: a checkpoint of the run to begin from instead of the untrained model.
        shuffle: permute the scalars between the steps with this seed: the control that an evaluation of the real
            parameters is compared with. What it gives has learnt nothing.
        console: for the summary.

    Raises:
        TrainingError: the journal is damaged before ``until``, or the parameters are not those that were trained.
        IncompatibleError: the base is another one.
        RecipeError: ``out`` holds files, or a number is out of range.
    """
    journal = journal / JOURNAL if journal.is_dir() else journal
    file = read_journal(journal)
    until = _until(file, until, journal)
    if out.exists() and any(out.iterdir()):
        raise RecipeError(f"{out}: holds files already; give a new folder")
    if snapshot is None and file.header.start > 0:
        raise RecipeError(
            f"{journal} begins after step {file.header.start}: give --snapshot checkpoint-{file.header.start}"
        )
    run = prepare_replay(build_run(_recipe(file, base, out), calibrate=False))
    assert run.journal is not None
    check_base(file, run.journal.base, journal)
    state = TrainState() if snapshot is None else restore(run, snapshot)
    records = _shuffled(file, shuffle).records[: until - file.header.start]
    hashes = {} if shuffle is not None else file.parameters
    for stop in sorted({step for step in hashes if state.step < step <= until} | {until}):
        state = replay(run, state, records[state.step - file.header.start : stop - file.header.start])
        _check(hashes.get(stop), parameters_digest(run.params), stop, journal)
    out.mkdir(parents=True, exist_ok=True)
    save_recipe(run.recipe, out)
    # The hash is in the copied journal already; of shuffled scalars there is no journal.
    save_state(with_changes(run, journal=None), state)
    if shuffle is None:
        shutil.copyfile(journal, out / JOURNAL)
    checked = sum(step <= until for step in hashes)
    (console or Console()).print(
        f"{out}: {state.step} steps replayed on {base}; hashes checked: {checked}", highlight=False, soft_wrap=True
    )
    return out


def _until(file: JournalFile, until: int | None, journal: Path) -> int:
    last = file.header.start + len(file.records)
    if file.problem is not None and (until is None or until > last):
        raise TrainingError(f"{file.problem}; everything before it is good: replay with --until {last}")
    if until is not None and not file.header.start <= until <= last:
        raise RecipeError(f"--until {until}: {journal} holds steps {file.header.start} to {last}")
    return last if until is None else until


def _recipe(file: JournalFile, base: str, out: Path) -> Recipe:
    raw = dict(file.header.recipe)
    raw["model"] = {**raw["model"], "name": base}
    raw["train"] = {**raw["train"], "output": str(out), "resume": False, "report_to": []}
    return parse_recipe(raw, source="the journal's recipe")


def _shuffled(file: JournalFile, seed: int | None) -> JournalFile:
    if seed is None:
        return file
    scalars = [record.c for record in file.records]
    random.Random(seed).shuffle(scalars)
    records = tuple(with_changes(record, c=c) for record, c in zip(file.records, scalars, strict=True))
    return with_changes(file, records=records)


def _check(expected: str | None, found: str, step: int, journal: Path) -> None:
    if expected is not None and expected != found:
        raise TrainingError(
            f"{journal}: after step {step} the parameters have the hash {found}, in training it was {expected}; this "
            "machine or version rounds differently: replay with the versions in env.json, on the same kind of device"
        )
