"""The composition root: Recipe -> Run. The only module that sees every part; the parts never see each other.

checkpoint -> load_model (stream, rotate, quantize) -> select -> attach(base, update, quantizer) -> train -> export
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from qaft.arch import FAMILIES, arch_of, heads_of
from qaft.bases.base import FrozenLinear, LinearSpec
from qaft.data import check_isolation, load_samples
from qaft.data.batches import Batch, EvalBatches, TrainBatches
from qaft.errors import RecipeError, TrainingError
from qaft.gradients import SOURCES
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.attach import attach, frozen_layers, load_trainables, trainable_parameters
from qaft.models.load import LoadedModel, linear_names, load_model
from qaft.models.source import CheckpointSource, open_source
from qaft.quant import build_quantizer
from qaft.recipe import RUN_RECIPE, KindSection, Recipe, load_recipe, save_recipe
from qaft.registry import build_from, check_options, lookup
from qaft.regularizers import REGULARIZERS, Regularizer
from qaft.selection import SELECTORS
from qaft.selection.capture import LayerScores, capture_scores
from qaft.train.checkpoint import latest_checkpoint, read_checkpoint
from qaft.train.console import make_console
from qaft.train.engine import AccelerateEngine
from qaft.train.groups import param_groups
from qaft.train.log import RunLog
from qaft.train.loss import CausalLoss
from qaft.train.objective import Objective, model_inputs
from qaft.train.optimizers import make_optimizer
from qaft.train.run import TrainRun
from qaft.train.schedules import make_scheduler
from qaft.updates import UPDATES

CALIBRATION_BATCHES = 16
"""Micro-batches for scores of rows and columns; RoCoFT uses about 200 samples."""


FP16_LOSS_SCALE = 1024.0
"""Keeps the gradients inside an fp16 model away from underflow; a power of two is exact in the fp32 ones."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A model with its adapted layers in place, and where its files are."""

    recipe: Recipe
    loaded: LoadedModel
    layers: dict[str, AdaptedLinear]
    device: torch.device

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.train.output)


def is_run_folder(path: str | Path) -> bool:
    """Return whether ``path`` is the output folder of a run."""
    return (Path(path) / RUN_RECIPE).is_file()


def default_device() -> torch.device:
    """Return this process's GPU (by ``LOCAL_RANK``), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def check_recipe(recipe: Recipe) -> None:
    """Check every option of every registered part before anything is loaded.

    Raises:
        RecipeError: an unknown kind or option.
    """
    parts: list[tuple[str, Mapping[str, type], KindSection]] = [
        ("select", SELECTORS, recipe.select),
        ("update", UPDATES, recipe.update),
        ("gradient", SOURCES, recipe.gradient),
        *((f"regularize[{i}]", REGULARIZERS, section) for i, section in enumerate(recipe.regularize)),
    ]
    for where, registry, section in parts:
        check_options(lookup(registry, section.kind, where=where), section.options, where=where)


def recipe_source(recipe: Recipe) -> CheckpointSource:
    """Return the base checkpoint of a recipe.

    Raises:
        ModelError: it cannot be found or read.
    """
    model = recipe.model
    return open_source(
        model.name,
        revision=model.revision,
        dtype=getattr(torch, model.dtype),
        trust_remote_code=model.trust_remote_code,
    )


def build_run(recipe: Recipe, *, device: torch.device | None = None) -> Run:
    """Load the base model and put the recipe's updates into it; parameters are at their start.

    Raises:
        RecipeError: an option is wrong, or a pattern matches no layer.
        ModelError: the checkpoint cannot be read.
    """
    check_recipe(recipe)
    device = device or default_device()
    source = recipe_source(recipe)
    selector = build_from(SELECTORS, recipe.select.kind, recipe.select.options, where="select")
    selected = selector(linear_names(source.config, trust_remote_code=recipe.model.trust_remote_code))
    chosen = frozenset(selected)
    loaded = load_model(
        recipe.model,
        qat=recipe.qat,
        latent=lambda name: recipe.qat is not None and name in chosen,
        adapted=lambda name: name in chosen,
        device=device,
        seed=recipe.train.seed,
    )
    scores = _scores(recipe, loaded, selected)
    layers = attach(loaded.model, selected, _adapter(recipe, loaded, scores))
    loaded.model.to(device)  # pyright: ignore[reportArgumentType]
    if recipe.train.gradient_checkpointing:
        _checkpoint_activations(loaded)
    return Run(recipe=recipe, loaded=loaded, layers=layers, device=device)


def _folded_scales(loaded: LoadedModel) -> dict[str, float]:
    """Return the root mean square of the norm weight that is folded into each linear layer."""
    if loaded.fusion is None:
        return {}
    readers = arch_of(loaded.source.config).readers()
    rms = {norm: float(loaded.norms[f"{norm}.weight"].float().pow(2).mean().sqrt()) for norm, _ in readers}
    return {name: rms[norm] for norm, names in readers for name in names}


def _checkpoint_activations(loaded: LoadedModel) -> None:
    with warnings.catch_warnings():
        # transformers 5 renames this method on its way to 6; only the old name is in all its versions.
        warnings.simplefilter("ignore", FutureWarning)
        loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _adapter(recipe: Recipe, loaded: LoadedModel, scores: Mapping[str, LayerScores]) -> Any:
    config = loaded.source.config
    folded = _folded_scales(loaded)
    dtype = getattr(torch, recipe.model.dtype)
    quantizer = None if recipe.qat is None else build_quantizer(recipe.qat.weights, scale_dtype=dtype)
    known = config.model_type in FAMILIES

    def adapt(name: str, base: FrozenLinear) -> AdaptedLinear:
        score = scores.get(name)
        spec = LinearSpec(
            name=name,
            out_features=base.out_features,
            in_features=base.in_features,
            dtype=getattr(torch, recipe.train.param_dtype),
            num_heads=heads_of(config, name) if known else None,
            row_scores=score.rows if score else None,
            column_scores=score.columns if score else None,
            input_scale=folded.get(name, 1.0),
            seed=recipe.train.seed,
        )
        update = build_from(UPDATES, recipe.update.kind, recipe.update.options, spec, where="update")
        return AdaptedLinear(base, update, quantizer=quantizer)

    return adapt


def _scores(recipe: Recipe, loaded: LoadedModel, selected: tuple[str, ...]) -> dict[str, LayerScores]:
    cls = lookup(UPDATES, recipe.update.kind, where="update")
    if not cls.wants_scores(**recipe.update.options):
        return {}
    batches = islice(_train_batches(recipe, loaded, rank=0, world_size=1).from_step(0), CALIBRATION_BATCHES)
    layers = {name: layer for name, layer in frozen_layers(loaded.model).items() if name in set(selected)}
    loss = CausalLoss(loaded.model)
    device = next(loaded.model.parameters()).device

    def run(batch: Any) -> Tensor:
        return loss(**{k: v.to(device) for k, v in model_inputs(batch).items() if v is not None})

    return capture_scores(layers, batches, run)


def _train_batches(recipe: Recipe, loaded: LoadedModel, *, rank: int, world_size: int) -> TrainBatches:
    return TrainBatches(
        load_samples(recipe.data, loaded.tokenizer, "train").samples,
        max_length=recipe.data.max_length,
        batch_size=recipe.train.batch_size,
        grad_accumulation=recipe.train.grad_accumulation,
        steps=recipe.train.steps,
        packing=recipe.data.packing,
        seed=recipe.train.seed,
        rank=rank,
        world_size=world_size,
        pad_id=pad_id_of(loaded.tokenizer),
    )


def pad_id_of(tokenizer: Any) -> int:
    """Return an id for padding; any would do, because padding is masked by position and never by id."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


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
    loss.verify_head()
    engine = AccelerateEngine(
        loss,
        optimizer,
        accumulation=recipe.train.grad_accumulation,
        clip=recipe.optim.clip,
        loss_scale=FP16_LOSS_SCALE if recipe.model.dtype == "float16" else 1.0,
        report_to=recipe.train.report_to,
        folder=folder,
        cpu=run.device.type == "cpu",
    )
    batches = _train_batches(recipe, run.loaded, rank=engine.rank, world_size=engine.world_size)
    if engine.rank == 0:
        save_recipe(recipe, folder)
        (folder / "env.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
    if recipe.train.report_to:
        engine.start_trackers(folder.name, recipe.dump())
    return TrainRun(
        recipe=recipe,
        engine=engine,
        objective=Objective(_regularizers(run), run.layers),
        source=build_from(SOURCES, recipe.gradient.kind, recipe.gradient.options, where="gradient"),
        params=params,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, recipe.optim, recipe.train.steps),
        batches=batches,
        eval_batches=_eval_batches(run, engine),
        log=RunLog(
            folder,
            total_steps=recipe.train.steps,
            device=engine.device,
            console=None if console is None else make_console(engine.device, console),
            is_main=engine.rank == 0,
            track=engine.track if recipe.train.report_to else None,
        ),
        folder=folder,
    )


def _regularizers(run: Run) -> list[Regularizer]:
    terms = []
    for i, section in enumerate(run.recipe.regularize):
        term = build_from(REGULARIZERS, section.kind, section.options, where=f"regularize[{i}]")
        term.prepare(run.layers)
        terms.append(term)
    return terms


def _eval_batches(run: Run, engine: AccelerateEngine) -> Iterable[Batch] | None:
    recipe = run.recipe
    if recipe.data.valid is None:
        return None
    batches = EvalBatches(
        load_samples(recipe.data, run.loaded.tokenizer, "valid").samples,
        max_length=recipe.data.max_length,
        batch_size=recipe.train.batch_size,
        rank=engine.rank,
        world_size=engine.world_size,
        pad_id=pad_id_of(run.loaded.tokenizer),
    )
    limit = recipe.train.eval_batches
    return batches if limit is None else list(islice(batches, limit))


def restore_run(folder: str | Path, *, device: torch.device | None = None) -> Run:
    """Rebuild a run from its folder, with the trainables of its last good checkpoint.

    Raises:
        RecipeError: the folder is no run folder.
        TrainingError: it holds no good checkpoint.
    """
    folder = Path(folder)
    recipe = load_recipe(folder)
    # The folder may have been moved since: where it lies now is where it is.
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"output": str(folder)})})
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise TrainingError(f"{folder}: no good checkpoint; train it first, or continue it with train.resume=true")
    run = build_run(recipe, device=device)
    load_trainables(run.loaded.model, read_checkpoint(checkpoint).trainables)
    return run


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
