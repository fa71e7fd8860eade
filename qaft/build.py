"""The composition root: Recipe -> Run. It sees every part of the model; the parts never see each other.

checkpoint -> load_model (stream, rotate, quantize) -> select -> attach(base, update, quantizer)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qaft.arch import FAMILIES, arch_of, heads_of
from qaft.bases.base import FrozenLinear, LinearSpec
from qaft.choices import entry_choice, entry_places, layer_scores
from qaft.errors import TrainingError
from qaft.gradients import SOURCES
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.attach import attach, load_trainables
from qaft.models.adapter import open_adapter
from qaft.models.adapter_start import require_targets, start_from
from qaft.models.load import LoadedModel, linear_names, load_model
from qaft.models.online import put_online
from qaft.models.sharing import Sharing, shared_source
from qaft.quant import build_quantizer
from qaft.recipe import RUN_RECIPE, Recipe, load_recipe
from qaft.registry import build_from, check_options, lookup
from qaft.regularizers import REGULARIZERS
from qaft.rotations import cache_quantizer, choice_of, input_quantizer, with_rotations, with_rotations_of
from qaft.sections import KindSection
from qaft.selection import SELECTORS
from qaft.selection.capture import LayerScores
from qaft.ties import shared_readers, tie
from qaft.train.checkpoint import latest_checkpoint, read_checkpoint
from qaft.updates import UPDATES


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
    entry_choice(recipe)


def build_run(
    recipe: Recipe, *, device: torch.device | None = None, calibrate: bool = True, share: bool = False
) -> Run:
    """Load the base model and put the recipe's updates into it; parameters are at their start.

    Args:
        recipe: what to build.
        device: where; default: ``default_device()``.
        calibrate: choose rows and columns by scores on ``data.train`` where the update wants them, and start from
            ``model.adapter``. Without, these choices are arbitrary: only for a run whose trainables are loaded from a
            checkpoint, which holds them.
        share: rank 0 of the job reads, quantizes and chooses, the others receive; collective.

    Raises:
        RecipeError: an option is wrong, or a pattern matches no layer.
        ModelError: the checkpoint cannot be read.
    """
    check_recipe(recipe)
    device = device or default_device()
    sharing = Sharing(device, active=share)
    source = shared_source(recipe.model, sharing)
    selector = build_from(SELECTORS, recipe.select.kind, recipe.select.options, where="select")
    names = linear_names(source.config, trust_remote_code=recipe.model.trust_remote_code)
    selected = selector(names)
    # What a checkpoint holds is not read again: neither scores nor the adapter that the run has started from.
    folder = recipe.model.adapter if calibrate else None
    adapter = None if folder is None else sharing.value(lambda: open_adapter(folder))
    if adapter is not None:
        require_targets(adapter, names, selected)
    chosen = frozenset(selected)
    recipe = sharing.value(lambda: with_rotations(recipe, source, chosen, device))
    loaded = load_model(
        recipe.model,
        qat=recipe.qat,
        source=source,
        choice=choice_of(recipe, source),
        latent=lambda name: recipe.qat is not None and name in chosen,
        adapted=lambda name: name in chosen,
        device=device,
        seed=recipe.train.seed,
        share=share,
    )
    scores = sharing.value(lambda: layer_scores(recipe, loaded, selected, calibrate=calibrate))
    places = entry_places(recipe, loaded, selected, sharing, calibrate=calibrate)
    layers = attach(loaded.model, selected, _adapter(recipe, loaded, scores, places))
    if adapter is not None:
        start_from(adapter, layers, loaded, sharing)
    tie(recipe, loaded.source.config, layers)
    _put_online(recipe, loaded)
    loaded.model.to(device)  # pyright: ignore[reportArgumentType]
    if recipe.train.gradient_checkpointing:
        _checkpoint_activations(loaded)
    return Run(recipe=recipe, loaded=loaded, layers=layers, device=device)


def _put_online(recipe: Recipe, loaded: LoadedModel) -> None:
    """Put in what the recipe does to activations: online rotations and the quantizers of inputs and of the KV cache."""
    if recipe.qat is None:
        return
    inputs, cache = input_quantizer(recipe.qat), cache_quantizer(recipe.qat, loaded.source.config)
    choice = choice_of(recipe, loaded.source)
    if inputs is not None or cache is not None or (choice is not None and choice.online):
        put_online(loaded.model, arch_of(loaded.source.config), choice, inputs=inputs, cache=cache)


def _folded_scale(loaded: LoadedModel, name: str) -> float:
    """Return the root mean square of the norm weight that is folded into a linear layer; 1 where none is."""
    fusion = loaded.fusion
    if fusion is None or name not in fusion.places:
        return 1.0
    gamma = fusion.gamma(fusion.places[name], loaded.originals)
    return 1.0 if gamma is None else float(gamma.pow(2).mean().sqrt())


def _checkpoint_activations(loaded: LoadedModel) -> None:
    with warnings.catch_warnings():
        # transformers 5 renames this method on its way to 6; only the old name is in all its versions.
        warnings.simplefilter("ignore", FutureWarning)
        loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _adapter(
    recipe: Recipe, loaded: LoadedModel, scores: Mapping[str, LayerScores], places: Mapping[str, Tensor]
) -> Any:
    config = loaded.source.config
    dtype = getattr(torch, recipe.model.dtype)
    quantizer = None if recipe.qat is None else build_quantizer(recipe.qat.weights, scale_dtype=dtype)
    known = config.model_type in FAMILIES
    norms = {name: norm for norm, names in shared_readers(recipe, config) for name in names}

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
            places=places.get(name),
            reads=norms.get(name),
            input_scale=_folded_scale(loaded, name),
            seed=recipe.train.seed,
        )
        update = build_from(UPDATES, recipe.update.kind, recipe.update.options, spec, where="update")
        return AdaptedLinear(base, update, quantizer=quantizer)

    return adapt


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
    saved = read_checkpoint(checkpoint)
    run = build_run(with_rotations_of(recipe, saved), device=device, calibrate=False)
    load_trainables(run.loaded.model, saved.trainables)
    return run
