"""What an update's layers are chosen by before training: scores of rows and columns, and single entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from qaft.bases.base import FrozenLinear
from qaft.data.loaders import train_batches
from qaft.errors import RecipeError
from qaft.layers.attach import frozen_layers
from qaft.models.load import LoadedModel
from qaft.models.sharing import Sharing
from qaft.recipe import Recipe
from qaft.registry import lookup
from qaft.selection.capture import LayerScores, capture_scores
from qaft.selection.gradients import largest_gradients
from qaft.train.loss import CausalLoss
from qaft.train.option_loss import task_loss
from qaft.updates import UPDATES
from qaft.updates.entries import EntryChoice

CALIBRATION_BATCHES = 16
"""Micro-batches for scores of rows and columns; RoCoFT uses about 200 samples."""

GRADIENT_BATCHES = 8
"""Micro-batches over which gradients are summed to choose entries; SIFT takes those of one optimizer step."""


def layer_scores(
    recipe: Recipe, loaded: LoadedModel, selected: tuple[str, ...], *, calibrate: bool
) -> dict[str, LayerScores]:
    """Return the scores of rows and columns of each selected layer, where the update wants them; else nothing.

    Args:
        recipe: says which update, and the data.
        loaded: the base model, without updates.
        selected: names of layers.
        calibrate: measure on ``data.train``; without, all scores are 0.
    """
    cls = lookup(UPDATES, recipe.update.kind, where="update")
    if not cls.wants_scores(**recipe.update.options):
        return {}
    layers = _selected_layers(loaded, selected)
    if not calibrate:
        return {n: LayerScores(torch.zeros(m.out_features), torch.zeros(m.in_features)) for n, m in layers.items()}
    return capture_scores(layers, _calibration_batches(recipe, loaded, CALIBRATION_BATCHES), _loss_on(recipe, loaded))


def entry_places(
    recipe: Recipe, loaded: LoadedModel, selected: tuple[str, ...], sharing: Sharing, *, calibrate: bool
) -> dict[str, Tensor]:
    """Return the entries of each selected weight that the update trains, where it wants them chosen; collective.

    Args:
        recipe: says which update, and the data.
        loaded: the base model, without updates.
        selected: names of layers.
        sharing: rank 0 chooses.
        calibrate: choose; without, the first entries stand in.
    """
    choice = entry_choice(recipe)
    if choice is None or choice.by == "random":
        return {}
    layers = _selected_layers(loaded, selected)
    if not calibrate:
        return {n: choice.first(m.out_features * m.in_features) for n, m in layers.items()}
    chosen: dict[str, Tensor] = {}

    def choose() -> None:
        if choice.by == "magnitude":
            chosen.update({n: choice.largest(m.dequantize()) for n, m in layers.items()})
            return
        loaded.model.requires_grad_(False)
        batches = partial(_calibration_batches, recipe, loaded, GRADIENT_BATCHES)
        chosen.update(largest_gradients(layers, choice, batches, _loss_on(recipe, loaded)))

    sharing.value(choose)
    return {name: sharing.tensor(lambda name=name: chosen[name]).cpu() for name in layers}


def entry_choice(recipe: Recipe) -> EntryChoice | None:
    """Return how the update chooses the entries that it trains; None when it does not.

    Raises:
        RecipeError: an option is out of range.
    """
    try:
        return lookup(UPDATES, recipe.update.kind, where="update").entry_choice(**recipe.update.options)
    except ValueError as error:
        raise RecipeError(f"update: {error}") from error


def _selected_layers(loaded: LoadedModel, selected: tuple[str, ...]) -> dict[str, FrozenLinear]:
    wanted = set(selected)
    return {name: layer for name, layer in frozen_layers(loaded.model).items() if name in wanted}


def _calibration_batches(recipe: Recipe, loaded: LoadedModel, count: int) -> Iterator[Any]:
    return islice(train_batches(recipe.data, recipe.train, loaded.tokenizer).from_step(0), count)


def _loss_on(recipe: Recipe, loaded: LoadedModel) -> Callable[[Any], Tensor]:
    """Return the loss of the model on a batch."""
    loss = task_loss(CausalLoss(loaded.model), recipe.data)
    device = next(loaded.model.parameters()).device
    return lambda batch: loss(**{k: v.to(device) for k, v in batch.loss_inputs().items() if v is not None})
