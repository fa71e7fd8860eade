"""``qaft patch``: the packed base that fine-tunes share, and putting patches onto it and taking them off."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rich.console import Console

from qaft.build import build_run
from qaft.commands.export import check_export
from qaft.commands.memory import evaluation_memory, loading_memory
from qaft.errors import RecipeError
from qaft.export import EXPORTERS, ExportInfo, ExportReport
from qaft.export.patch_file import load_patch
from qaft.export.patch_folder import apply_patch, revert_patch
from qaft.recipe import Recipe, parse_recipe
from qaft.sections import CODE_BOOK_KINDS

_FORMAT_OF = {"int": "compressed-tensors", **dict.fromkeys(CODE_BOOK_KINDS, "bnb")}
"""Kind of grid -> the format of its packed checkpoint."""


def export_base(recipe: Recipe, out: Path, *, force: bool = False, verify: bool = True) -> ExportReport:
    """Write the packed model of a recipe as it is before training, the base of its patches, and report it.

    Args:
        recipe: whose model, layers, grid and rotation; runs that agree in these share the base.
        out: a new folder.
        force: replace what is there.
        verify: reload it in a fresh process and compare before it appears.

    Raises:
        RecipeError: the recipe trains through no grid that a packed checkpoint holds.
        ExportError: see ``export_compressed``.
    """
    kind = None if recipe.qat is None else recipe.qat.weights.kind
    if kind not in _FORMAT_OF:
        raise RecipeError(
            f"qat.weights.kind={kind!r}: a packed base holds layers on {' or '.join(_FORMAT_OF)} grids; add a qat "
            "section with one of these"
        )
    options = {"format": _FORMAT_OF[kind], "out": str(out), "force": force, "verify": verify}
    recipe = parse_recipe({**recipe.dump(), "export": [options]}, source="qaft patch base")
    section = recipe.export[0]
    check_export(recipe, section)
    with loading_memory({"model.name": recipe.model.name}):
        # An update changes nothing before it is trained: this is the base model on the grid of the run.
        run = build_run(recipe, calibrate=False)
    command = shlex.join(["qaft", *sys.argv[1:]])
    info = ExportInfo(recipe=recipe.dump(), base=recipe.model.name, command=command, trained=False)
    run.loaded.model.eval()
    with evaluation_memory(f"exporting {out}", {}):
        report = EXPORTERS[section.format](run.loaded, section, out, info)
    _say(f"{report.folder}: packed base ({section.format}, {sum(report.sizes.values()) / 2**20:.1f} MiB)")
    return report


def apply_to(patch: Path, base: Path, out: Path | None) -> Path:
    """Put the patch in a folder onto a packed checkpoint, in place without ``out``; see ``apply_patch``."""
    loaded = load_patch(patch)
    folder = apply_patch(loaded, base, out)
    rows = sum(len(layer.rows) for layer in loaded.layers.values())
    _say(f"{folder}: {loaded.name} is on it ({rows} rows of {len(loaded.layers)} layers)")
    return folder


def revert_from(patch: Path, folder: Path, out: Path | None) -> Path:
    """Take the patch in a folder off a packed checkpoint, in place without ``out``; see ``revert_patch``."""
    loaded = load_patch(patch)
    result = revert_patch(loaded, folder, out)
    _say(f"{result}: {loaded.name} is off it")
    return result


def _say(line: str) -> None:
    Console().print(line, highlight=False, soft_wrap=True)
