"""From a built Run to everything that training takes: data, engine, optimizer, schedule, log."""

from __future__ import annotations

import importlib
import json
import platform
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from qaft.build import Run
from qaft.data import OptionsSample, check_isolation, check_options
from qaft.data.batches import AnySample
from qaft.data.loaders import eval_batches, train_batches
from qaft.errors import RecipeError
from qaft.gradients import SOURCES
from qaft.gradients.extragradient import Extragradient
from qaft.gradients.two_point import TwoPointSource
from qaft.layers.attach import trainable_parameters, update_buffers
from qaft.layers.reach import reached
from qaft.ranks import world_size
from qaft.recipe import Recipe, save_recipe
from qaft.registry import build_from
from qaft.regularizers import REGULARIZERS
from qaft.regularizers.base import PassTerm, Penalty, Regularizer, StepRule
from qaft.reselection import Reselection
from qaft.train.console import make_console
from qaft.train.diagnostics import Diagnostics
from qaft.train.engine import AccelerateEngine, Engine
from qaft.train.groups import param_groups
from qaft.train.journal import Journal, base_digest
from qaft.train.log import RunLog
from qaft.train.loss import CausalLoss
from qaft.train.objective import Objective
from qaft.train.optimizers import make_optimizer
from qaft.train.option_loss import TaskLoss, task_loss
from qaft.train.regularized import RegularizedLoss
from qaft.train.run import TrainRun
from qaft.train.schedules import make_scheduler
from qaft.zero import engine_config

FP16_LOSS_SCALE = 1024.0
"""Keeps the gradients inside an fp16 model away from underflow; a power of two is exact in the fp32 ones."""


def prepare_training(run: Run, *, console: Console | None = None) -> TrainRun:
    """Return what ``fit`` needs: data, engine, optimizer, schedule and log of a built run; writes the resolved recipe.

    Raises:
        RecipeError: the recipe has no training data, or an option does not fit.
        DataError: the data cannot be read.
    """
    recipe, model = run.recipe, run.loaded.model
    if recipe.data.train is None:
        raise RecipeError("data.train is required for training; give a file or a hub id")
    if recipe.data.packing:
        check_isolation(model, vocab_size=model.config.get_text_config().vocab_size)
    folder = run.folder
    folder.mkdir(parents=True, exist_ok=True)
    params = trainable_parameters(model)
    optimizer = make_optimizer(param_groups(params.items(), recipe.optim), recipe.optim, run.device)
    loss = CausalLoss(model)
    with reached(run.layers) as names:
        loss.verify_head()
    if unreached := run.layers.keys() - names:
        warnings.warn(_unreached(sorted(unreached)), stacklevel=2)
    regularizers = _regularizers(run)
    _pull_before_steps(regularizers, optimizer)
    module = _with_pass_terms(task_loss(loss, recipe.data), regularizers, run)
    engine = _make_engine(run, module, optimizer)
    part = {"rank": engine.rank, "world_size": engine.world_size}
    batches = train_batches(recipe.data, recipe.train, run.loaded.tokenizer, **part)
    evaluation = eval_batches(recipe.data, recipe.train, run.loaded.tokenizer, **part)
    _check_options(run, batches.samples, [] if evaluation is None else evaluation.samples)
    if engine.rank == 0:
        save_recipe(recipe, folder)
        (folder / "env.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
    if recipe.train.report_to:
        engine.start_trackers(folder.name, recipe.dump())
    return _train_run(
        run,
        engine,
        optimizer,
        console,
        batches=batches,
        eval_batches=evaluation,
        # Under ZeRO 3 a parameter is whole only inside a forward pass.
        diagnostics=Diagnostics(run.layers) if engine.rank == 0 and all(p.numel() for p in params.values()) else None,
        terms=[term for term in regularizers if isinstance(term, PassTerm)],
        reselection=_reselection(run, optimizer),
        objective=Objective([r for r in regularizers if isinstance(r, Penalty)], run.layers, on_step=_step_of(module)),
    )


def _check_options(run: Run, *samples: Sequence[AnySample]) -> None:
    """Guarantee that the model keeps options apart, where some stand beside each other."""
    if any(isinstance(sample, OptionsSample) and sample.is_tree for sample in chain(*samples)):
        model = run.loaded.model
        vocab_size = model.config.get_text_config().vocab_size
        check_options(model, vocab_size=vocab_size, max_length=run.recipe.data.max_length)


def _reselection(run: Run, optimizer: Optimizer) -> Reselection | None:
    """Return what chooses the rotations again, where the recipe asks for it.

    Raises:
        RecipeError: there are several processes.
    """
    if run.recipe.qat is None or run.recipe.qat.reselect_every is None:
        return None
    if world_size() > 1:
        raise RecipeError(
            f"qat.reselect_every is for one process, and there are {world_size()}: only the first has the checkpoint's "
            "weights, from which the layers are turned; leave it out"
        )
    return Reselection(run.recipe, run.loaded, run.layers, optimizer, run.device)


def prepare_replay(run: Run) -> TrainRun:
    """Return what ``replay`` and a checkpoint of its result need: ``prepare_training`` without data.

    Raises:
        RecipeError: an option does not fit.
    """
    params = trainable_parameters(run.loaded.model)
    optimizer = make_optimizer(param_groups(params.items(), run.recipe.optim), run.recipe.optim, run.device)
    engine = _make_engine(run, CausalLoss(run.loaded.model), optimizer)
    return _train_run(run, engine, optimizer, None, batches=_NoBatches(), objective=Objective((), run.layers))


class _NoBatches:
    """Training data of a run that is replayed."""

    def from_step(self, step: int) -> tuple[()]:
        """Return nothing."""
        return ()


def _train_run(run: Run, engine: Engine, optimizer: Optimizer, console: Console | None, **data: Any) -> TrainRun:
    recipe, model = run.recipe, run.loaded.model
    source = build_from(SOURCES, recipe.gradient.kind, recipe.gradient.options, where="gradient")
    if isinstance(source, Extragradient) and engine.world_size > 1:
        raise RecipeError(
            f"gradient.kind=extragradient: its second gradient is that of one process, and there are "
            f"{engine.world_size}; train with one process, or set gradient.kind to backprop"
        )
    journal = None
    if isinstance(source, TwoPointSource):
        is_main = engine.rank == 0
        journal = Journal(run.folder, base=base_digest(model), recipe=recipe.dump(), is_main=is_main)
    return TrainRun(
        recipe=recipe,
        engine=engine,
        source=source,
        params=trainable_parameters(model),
        buffers=update_buffers(model),
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, recipe.optim, recipe.train.steps),
        log=RunLog(
            run.folder,
            total_steps=recipe.train.steps,
            device=engine.device,
            console=None if console is None else make_console(engine.device, console),
            is_main=engine.rank == 0,
            track=engine.track if recipe.train.report_to else None,
            per_token=not recipe.data.scores_options,
        ),
        folder=run.folder,
        journal=journal,
        **data,
    )


def check_engine(recipe: Recipe) -> None:
    """Guarantee, before anything is loaded, that the engine is installed and its configuration fits the recipe.

    Raises:
        RecipeError: DeepSpeed is asked for and not installed, or its configuration contradicts the recipe.
    """
    if recipe.train.deepspeed is not None:
        engine_config(recipe, world_size=world_size(), num_trainable=1)
        importlib.import_module("qaft.train.deepspeed")


def _make_engine(run: Run, loss: nn.Module, optimizer: Optimizer) -> Engine:
    train = run.recipe.train
    common: dict[str, Any] = {
        "loss_scale": FP16_LOSS_SCALE if run.recipe.model.dtype == "float16" else 1.0,
        "report_to": train.report_to,
        "folder": run.folder,
    }
    if train.deepspeed is None:
        accumulation, clip = train.grad_accumulation, run.recipe.optim.clip
        return AccelerateEngine(
            loss, optimizer, accumulation=accumulation, clip=clip, cpu=run.device.type == "cpu", **common
        )
    # An extra of the package: only where it is asked for.
    from qaft.train.deepspeed import DeepSpeedEngine

    trained = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
    config = engine_config(run.recipe, world_size=world_size(), num_trainable=trained)
    return DeepSpeedEngine(loss, optimizer, config, device=run.device, **common)


def _unreached(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"select: no token of a trial pass went through {shown}; layers that the model does not use, or experts that "
        "no token is routed to, are not trained: leave them out of select.targets"
    )


def _regularizers(run: Run) -> list[Regularizer]:
    terms = []
    for i, section in enumerate(run.recipe.regularize):
        term = build_from(REGULARIZERS, section.kind, section.options, where=f"regularize[{i}]")
        try:
            term.prepare(run.layers)
        except ValueError as error:
            raise RecipeError(f"regularize[{i}]: {error}") from error
        if isinstance(term, PassTerm) and term.remembers_samples and world_size() > 1:
            raise RecipeError(
                f"regularize[{i}]: {section.kind} compares a sample with its last pass, which another of the "
                f"{world_size()} processes may have made; use variant lazy_half, or train with one process"
            )
        terms.append(term)
    return terms


def _pull_before_steps(regularizers: list[Regularizer], optimizer: Optimizer) -> None:
    for rule in regularizers:
        if isinstance(rule, StepRule):
            optimizer.register_step_pre_hook(lambda stepping, *_, rule=rule: rule.before_step(stepping))


def _with_pass_terms(loss: TaskLoss, regularizers: list[Regularizer], run: Run) -> TaskLoss | RegularizedLoss:
    terms = [term for term in regularizers if isinstance(term, PassTerm)]
    if not terms:
        return loss
    assert isinstance(loss, CausalLoss)  # check_compatible refuses other rows with terms that compare passes
    return RegularizedLoss(loss, terms, run.layers)


def _step_of(module: TaskLoss | RegularizedLoss) -> Callable[[int], None]:
    """Return what tells the loss which optimizer step it is in."""
    return partial(setattr, module, "step") if isinstance(module, RegularizedLoss) else lambda _: None


def environment() -> dict[str, Any]:
    """Return versions and hardware, for ``env.json``."""
    packages = ("qaft", "torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "compressed-tensors")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu_threads": torch.get_num_threads(),
    }
