"""``qaft train``: build, fit, export."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from qaft.build import Run, build_run
from qaft.commands.export import check_export, export_run
from qaft.commands.memory import loading_memory, training_memory
from qaft.compat import cautions
from qaft.export.folded import require_foldable
from qaft.ranks import rank
from qaft.recipe import Recipe
from qaft.train.loop import fit
from qaft.train.resume import continues, start_state
from qaft.training import check_engine, prepare_training


def train_and_export(recipe: Recipe, console: Console | None = None) -> Run:
    """Train a recipe (or continue it, with ``train.resume``), write its exports and return the trained run.

    Raises:
        QaftError: see ``build_run``, ``prepare_training``, ``fit`` and ``export_run``.
    """
    console = console or Console(quiet=rank() != 0)
    for caution in cautions(recipe):
        console.print(f"caution: {caution}", highlight=False)
    # What cannot be exported is said now and not after the training.
    for section in recipe.export:
        check_export(recipe, section)
    check_engine(recipe)
    # A checkpoint holds the rows and columns that were chosen from data.
    with loading_memory({"model.name": recipe.model.name, "model.storage": recipe.model.storage}):
        run = build_run(recipe, calibrate=not continues(recipe), share=True)
    for section in recipe.export:
        require_foldable(run.loaded, section)
    trained = sum(layer.update.num_trainable() for layer in run.layers.values())
    training = prepare_training(run, console=console)
    weights = sum(layer.out_features * layer.in_features for layer in run.layers.values())
    console.print(
        f"training {trained:,} parameters in {len(run.layers)} layers of {weights:,} weights on {run.device}; "
        f"run folder {run.folder}",
        highlight=False,
        soft_wrap=True,
    )
    with training_memory(recipe):
        fit(training, start_state(training))
    training.engine.release()
    run = replace(run, recipe=training.current_recipe)
    if training.engine.rank == 0:
        for section in recipe.export:
            export_run(run, section, console)
    training.engine.wait()
    training.engine.end_trackers()
    return run
