"""The recipes of an adapter: the one that puts it beside a packed base, and the short QAT run that starts from it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qaft.arch import arch_of
from qaft.errors import ModelError, RecipeError
from qaft.models.adapter import LoraFolder
from qaft.recipe import parse_recipe
from qaft.rotation.fuse import Fusion
from qaft.sections import CODE_BOOK_KINDS
from qaft.selection.patterns import Patterns

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FORMAT_OF = {"int4": "compressed-tensors", "int8_group": "compressed-tensors", **dict.fromkeys(CODE_BOOK_KINDS, "bnb")}
"""Packed storage -> the format whose files hold its grid."""

_BITS = {"int4": 4, "int8_group": 8}


def adapter_sections(adapter: LoraFolder, model: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the sections ``model``, ``select`` and ``update`` of a run that starts from an adapter.

    Args:
        adapter: where it starts.
        model: the section of the base model.
        names: linear layers of the base, those of the adapter among them.
    """
    # One update for all layers: the largest rank holds every other, and factors take up the ratio of the scalings.
    rank = max(layer.rank for layer in adapter.layers.values())
    scale, _ = Counter(layer.scale for layer in adapter.layers.values()).most_common(1)[0]
    return {
        "model": {**model, "adapter": str(adapter.path)},
        "select": {"kind": "patterns", "targets": _targets(adapter, names)},
        "update": {"kind": "lowrank", "rank": rank, "alpha": scale * rank},
    }


def _targets(adapter: LoraFolder, names: Sequence[str]) -> list[str]:
    """Return patterns that select the layers of the adapter and no other: kinds of layers where that is enough."""
    kinds = sorted({re.escape(name.rpartition(".")[2]) for name in adapter.layers})
    if set(Patterns(targets=kinds)(names)) == set(adapter.layers):
        return kinds
    return [rf"^{re.escape(name)}$" for name in adapter.layers]


def rescue_sections(
    adapter: LoraFolder, sections: dict[str, Any], config: PretrainedConfig, *, data: str | None, run: Path
) -> dict[str, Any]:
    """Return the recipe of a QAT run on the grid of the storage in ``sections["model"]``, as plain values.

    Args:
        adapter: where it starts.
        sections: see ``adapter_sections``.
        config: of the base model.
        data: ``data.train``; None where it is given to ``qaft train``.
        run: its run folder.
    """
    model = sections["model"]
    storage = model["storage"]
    grid = (
        {"kind": storage} if storage in CODE_BOOK_KINDS else {"bits": _BITS[storage], "group_size": model["group_size"]}
    )
    return {
        **sections,
        "qat": {"weights": grid, "rotation": _rotation(adapter, config)},
        "optim": {"lr": 1.0e-4},
        **({} if data is None else {"data": {"train": data}}),
        "train": {"steps": 200, "batch_size": 8, "output": str(run)},
        "export": [{"format": FORMAT_OF[storage]}],
    }


def _rotation(adapter: LoraFolder, config: PretrainedConfig) -> str:
    """Return ``hadamard`` where the model can be rotated and the adapter turned with it, else ``none``."""
    try:
        fusion = Fusion(arch_of(config))
    except ModelError:
        return "none"
    return "none" if any(map(fusion.moves_shift, adapter.layers)) else "hadamard"


def write_recipe(sections: dict[str, Any], path: Path, *, force: bool) -> None:
    """Write a recipe as YAML, checked as ``qaft train`` checks it.

    Raises:
        RecipeError: another file is at ``path`` and ``force`` is not set; or a choice is impossible.
    """
    parse_recipe(sections, source=str(path))
    text = yaml.safe_dump(sections, sort_keys=False)
    if path.exists() and not force and (path.is_dir() or path.read_text(encoding="utf-8") != text):
        raise RecipeError(f"{path}: exists already and is another; give another place with --recipe, or --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
