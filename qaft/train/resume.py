"""What of a run goes into a checkpoint, and how a run continues from one."""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qaft
from qaft.errors import IncompatibleError, RecipeError
from qaft.recipe import Recipe
from qaft.train.checkpoint import Checkpoint, checkpoint_path, latest_checkpoint, read_checkpoint, write_checkpoint
from qaft.train.journal import read_journal
from qaft.train.replay import check_parameters, continue_journal
from qaft.train.rng import restore_rng
from qaft.train.run import TrainRun, TrainState

_SECTIONS = ("model", "select", "update", "qat", "gradient", "regularize", "optim", "data")
_TRAIN_KEYS = ("steps", "batch_size", "grad_accumulation", "seed", "param_dtype")


def deciding_values(recipe: Recipe) -> dict[str, Any]:
    """Return the parts of a recipe that decide what is computed, as ``{section: values}``.

    Outputs (``export``), logging, evaluation and checkpoint intervals may change between a run and its continuation.
    """
    return deciding_parts(recipe.dump())


def deciding_parts(dump: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same of a recipe as plain values."""
    return {name: dump[name] for name in _SECTIONS} | {"train": {key: dump["train"][key] for key in _TRAIN_KEYS}}


def save_state(run: TrainRun, state: TrainState) -> Path:
    """Write the checkpoint of the last finished step (rank 0) and return its path once every rank may go on.

    Raises:
        TrainingError: see ``write_checkpoint``.
    """
    # Collective: engines may keep parts of these on every rank.
    trainables, optimizer = _trainables(run), run.engine.optimizer_state()
    if run.journal is not None:
        check_parameters(run, state.step)
    if run.engine.rank == 0:
        recipe = deciding_values(run.current_recipe)
        nested = {
            "progress": {"tokens": state.tokens, "unlogged_losses": state.unlogged_losses},
            "optimizer": optimizer,
            "scheduler": run.scheduler.state_dict(),
            "rng": state.rng,
            "source": state.source,
            "terms": [term.state_dict(state.step) for term in run.terms],
            "recipe": recipe,
            "recipe_sha256": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
            "versions": library_versions(),
        }
        checkpoint = Checkpoint(step=state.step, trainables=trainables, state=nested)
        write_checkpoint(run.folder, checkpoint, keep=run.section.keep)
    run.engine.wait()
    return checkpoint_path(run.folder, state.step)


def _trainables(run: TrainRun) -> dict[str, Tensor]:
    return {**run.engine.whole_parameters(run.params), **run.buffers}


def library_versions() -> dict[str, str]:
    """Return the versions that a bit-exact continuation depends on."""
    return {
        "qaft": qaft.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
    }


def continues(recipe: Recipe) -> bool:
    """Return whether training this recipe starts from a checkpoint."""
    return recipe.train.resume and latest_checkpoint(Path(recipe.train.output)) is not None


def start_state(run: TrainRun) -> TrainState:
    """Return where training starts: the newest good checkpoint and what the journal holds after it with
    ``train.resume``, else step 0.

    Raises:
        RecipeError: there are checkpoints or a journal in the folder and ``train.resume`` is off.
        IncompatibleError: the checkpoint or the journal belongs to another run; see ``restore``.
    """
    latest = latest_checkpoint(run.folder)
    journal = None if run.journal is None or not run.journal.path.exists() else run.journal.path
    earlier = latest or journal
    if earlier is not None and not run.section.resume:
        raise RecipeError(
            f"train.output={run.folder} holds {earlier.name} of an earlier run: set train.resume=true to continue it, "
            "or choose another folder"
        )
    if earlier is None and run.section.resume:
        run.log.note(f"train.resume: no checkpoint in {run.folder}, starting at step 0")
    if latest is None and journal is not None:
        _check_recipe(deciding_parts(read_journal(journal).header.recipe), deciding_values(run.recipe), journal)
    state = TrainState() if latest is None else restore(run, latest)
    return state if run.journal is None else continue_journal(run, state)


def restore(run: TrainRun, path: Path) -> TrainState:
    """Load a checkpoint into the run's parameters and buffers, optimizer, scheduler, source and random generators.

    Everything is checked before anything is changed. A different torch version only warns.

    Raises:
        IncompatibleError: recipe, or names, shapes or dtypes of the parameters differ; the message says which.
        TrainingError: the checkpoint is damaged.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint.state
    _check_recipe(state["recipe"], deciding_values(run.recipe), path)
    _check_trainables(checkpoint.trainables, _trainables(run), path)
    changed = {k: v for k, v in library_versions().items() if state["versions"].get(k) != v}
    if changed:
        warnings.warn(
            f"{path} was written with {state['versions']}, now {changed}: the continuation may differ in rounding",
            stacklevel=2,
        )
    run.engine.load_parameters(run.params, checkpoint.trainables)
    for name, buffer in run.buffers.items():
        buffer.copy_(checkpoint.trainables[name])
    run.engine.load_optimizer_state(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    run.source.load_state_dict(state["source"])
    if "terms" in state:  # earlier checkpoints have none, as no term had a state
        for term, saved in zip(run.terms, state["terms"], strict=True):
            term.load_state_dict(saved)
    restore_rng(state["rng"], run.engine.device)
    progress = state["progress"]
    return TrainState(
        step=checkpoint.step, tokens=progress["tokens"], unlogged_losses=tuple(progress["unlogged_losses"])
    )


def _check_recipe(stored: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    before, now = _by_key(stored), _by_key(current)
    differing = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if differing:
        changes = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in differing)
        raise IncompatibleError(
            f"{path} was trained with another recipe ({changes}); restore these values, or choose another train.output"
        )


def _check_trainables(stored: Mapping[str, Tensor], current: Mapping[str, Tensor], path: Path) -> None:
    problems = [f"{name} is not in the model" for name in stored.keys() - current.keys()]
    problems += [f"{name} is not in the checkpoint" for name in current.keys() - stored.keys()]
    for name in stored.keys() & current.keys():
        old, new = stored[name], current[name]
        if old.shape != new.shape or old.dtype != new.dtype:
            problems.append(f"{name} is {list(old.shape)} {old.dtype} there, {list(new.shape)} {new.dtype} here")
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise IncompatibleError(f"{path} does not fit the model: {shown}; check the sections model, select and update")


def _by_key(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{section.key: value}``; a section that is no mapping (a list, null) is one value."""
    flat: dict[str, Any] = {}
    for section, content in sections.items():
        if isinstance(content, Mapping):
            flat |= {f"{section}.{key}": value for key, value in content.items()}
        else:
            flat[section] = content
    return flat
