"""Which layers share something of their updates because they read the same norm, and the sharing itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qaft.arch import FAMILIES, arch_of
from qaft.errors import RecipeError
from qaft.layers.adapted import AdaptedLinear
from qaft.recipe import Recipe
from qaft.registry import lookup
from qaft.updates import UPDATES

Readers = tuple[tuple[str, tuple[str, ...]], ...]
"""(norm, the linear layers that read it) in the order of depth."""


def shared_readers(recipe: Recipe, config: Any) -> Readers:
    """Return the groups of layers that share, none where the update shares nothing or may go without.

    Args:
        recipe: names update and options.
        config: of the model; in families that are not known, which layers read one norm is not.

    Raises:
        ModelError: the family is not known, and the update cannot go without.
    """
    update = lookup(UPDATES, recipe.update.kind, where="update")
    if not update.is_tied(**recipe.update.options):
        return ()
    if config.model_type not in FAMILIES and not update.needs_all_readers:
        return ()
    return arch_of(config).readers()


def tie(recipe: Recipe, config: Any, layers: Mapping[str, AdaptedLinear]) -> None:
    """Let updates of layers that read the same norm share what their class says, where the update's options say so.

    Args:
        recipe: names update and options.
        config: of the model.
        layers: the trained ones, by name.

    Raises:
        RecipeError: of the layers that read a norm only some are trained, and all would be changed.
    """
    needs_all = lookup(UPDATES, recipe.update.kind, where="update").needs_all_readers
    for norm, readers in shared_readers(recipe, config):
        trained = [name for name in readers if name in layers]
        if needs_all and trained and len(trained) < len(readers):
            raise RecipeError(
                f"update.tie: {', '.join(trained)} cannot share the scaling of {norm} without "
                f"{', '.join(sorted(set(readers) - set(trained)))}, which it would scale too; add these to "
                "select.targets, or set update.tie to false"
            )
        for name in trained[1:]:
            layers[name].update.tie_to(layers[trained[0]].update)
