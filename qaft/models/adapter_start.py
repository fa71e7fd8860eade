"""A run that starts from an adapter: the factors of a LoRA on the original base become those of the run's updates.

In a fused basis (W' = R_out^T W diag(gamma) R_in) the factors are turned with the weight, the rank unchanged:

    dW' = R_out^T B A diag(gamma) R_in    =>    up = R_out^T B,   down = A diag(gamma) R_in

Shapes: O = out_features, I = in_features, R = rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from qaft.errors import ModelError, RecipeError
from qaft.layers.adapted import AdaptedLinear
from qaft.models.adapter import LoraFolder
from qaft.models.sharing import Sharing
from qaft.updates.base import LowRankFactors
from qaft.updates.lowrank import LowRank

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel


def require_targets(adapter: LoraFolder, names: Collection[str], selected: Collection[str]) -> None:
    """Refuse an adapter that would not be whole in the run.

    Args:
        adapter: what the run starts from.
        names: linear layers of the base that can be adapted.
        selected: those that the run adapts.

    Raises:
        ModelError: a layer of the adapter is no such layer.
        RecipeError: a layer of the adapter is not selected.
    """
    if foreign := [name for name in adapter.layers if name not in names]:
        raise ModelError(
            f"{adapter.path}: {foreign[0]} ({len(foreign)} of {len(adapter.layers)} layers) is no linear layer of the "
            f"blocks of this base; the adapter is for {adapter.base or 'another base'}: give that one, or train an "
            "adapter without embeddings and head"
        )
    if left := [name for name in adapter.layers if name not in selected]:
        raise RecipeError(
            f"model.adapter: {adapter.path} holds {left[0]} ({len(left)} of {len(adapter.layers)} layers), which "
            "select.targets leaves out: that part of the adapter would be lost; add it to select.targets"
        )


@torch.no_grad()
def start_from(adapter: LoraFolder, layers: Mapping[str, AdaptedLinear], loaded: LoadedModel, sharing: Sharing) -> None:
    """Put the adapter into the updates of its layers; other layers start as they would without it. Collective.

    Raises:
        ModelError: a factor has another shape than its layer, or cannot be brought into the basis of the run.
        RecipeError: update.rank is below the rank of the adapter.
    """
    for name in adapter.layers:
        # One layer at a time: only the process that reads the base needs the folder.
        read = sharing.value(partial(adapter.factors, name))
        layer = layers[name]
        shape = (read.up.shape[0], read.down.shape[1])
        if shape != (layer.out_features, layer.in_features):
            raise ModelError(
                f"{adapter.path}: {name} is for a weight of {list(shape)}, and this base has "
                f"[{layer.out_features}, {layer.in_features}]; the adapter is for {adapter.base or 'another base'}"
            )
        update = layer.update
        assert isinstance(update, LowRank)
        try:
            update.start_from(turned(name, read, loaded))
        except ValueError as error:
            raise RecipeError(f"update.rank: {error}; set it to at least the rank of {adapter.path}") from error


def turned(name: str, factors: LowRankFactors, loaded: LoadedModel) -> LowRankFactors:
    """Return the factors of the same update in the basis of a loaded model, fp32.

    Raises:
        ModelError: a bias has taken up what a LayerNorm adds, which the update would not see any more.
    """
    fusion = loaded.fusion
    if fusion is None or name not in fusion.places:
        return factors
    if fusion.moves_shift(name):
        raise ModelError(
            f"{name}: rotated, its own bias takes up the bias of {fusion.places[name].norm}, which an adapter would "
            "not see any more; set qat.rotation to none"
        )
    place = fusion.places[name]
    down = replace(place, writes=None, centers=None).fuse(factors.down, fusion.gamma(place, loaded.originals))
    return LowRankFactors(down=down, up=replace(place, reads=None).fuse(factors.up, None))
