"""``qaft train``: build, fit, export."""

from __future__ import annotations

from rich.console import Console

from qaft.build import Run, build_run, prepare_training
from qaft.commands.export import check_export, export_run
from qaft.compat import cautions
from qaft.recipe import Recipe
from qaft.train.loop import fit
from qaft.train.resume import start_state


def train_and_export(recipe: Recipe, console: Console | None = None) -> Run:
    """Train a recipe (or continue it, with ``train.resume``), write its exports and return the trained run.

    Raises:
        QaftError: see ``build_run``, ``prepare_training``, ``fit`` and ``export_run``.
    """
    console = console or Console()
    for caution in cautions(recipe):
        console.print(f"caution: {caution}", highlight=False)
    # What cannot be exported is said now and not after the training.
    for section in recipe.export:
        check_export(recipe, section)
    run = build_run(recipe)
    training = prepare_training(run, console=console)
    trained = sum(p.numel() for p in training.params.values())
    weights = sum(layer.out_features * layer.in_features for layer in run.layers.values())
    console.print(
        f"training {trained:,} parameters in {len(run.layers)} layers of {weights:,} weights on {run.device}; "
        f"run folder {run.folder}",
        highlight=False,
        soft_wrap=True,
    )
    fit(training, start_state(training))
    if training.engine.rank == 0:
        for section in recipe.export:
            export_run(run, section, console)
    training.engine.wait()
    training.engine.end_trackers()
    return run
