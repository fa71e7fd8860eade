"""``qaft merge-adapter``: a LoRA on the grid of a packed model: what survives of it, and a run that saves the rest."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qaft.build import Run, build_run
from qaft.commands.export import check_export, export_run
from qaft.commands.memory import loading_memory
from qaft.commands.rescue import FORMAT_OF, adapter_sections, rescue_sections, write_recipe
from qaft.commands.survival_report import is_lost, kind_table, worst_table
from qaft.errors import RecipeError
from qaft.export.survival import SMALLEST_SHARE, Survival, layer_survival
from qaft.layers.adapted import AdaptedLinear
from qaft.models.adapter import LoraFolder, open_adapter
from qaft.models.adapter_start import require_targets
from qaft.models.load import linear_names
from qaft.models.source import config_of
from qaft.quant import CODE_BOOKS
from qaft.quant.base import Quantizer
from qaft.recipe import parse_recipe
from qaft.sections import ExportSection, ModelSection


@dataclass(frozen=True, kw_only=True)
class Merge:
    """What the user has asked for.

    Attributes:
        adapter: folder of a PEFT LoRA.
        base: folder or id of its 16-bit base.
        storage: a key of ``FORMAT_OF``.
        dtype: of all that is not packed.
        group_size: weights per scale, -1 for one scale per channel; None for the default of the storage.
        out: folder of the requantized export, or None for none.
        recipe: file of the rescuing run's recipe; None for ``<out or adapter>-qat.yaml``, where a layer loses much.
        data: its training data, or None.
        force: overwrite, and export although the update does not survive.
    """

    adapter: Path
    base: str
    storage: str = "int4"
    dtype: str = "bfloat16"
    group_size: int | None = None
    out: Path | None = None
    recipe: Path | None = None
    data: str | None = None
    force: bool = False

    def model(self) -> dict[str, Any]:
        """Return the section of the packed base, as plain values.

        Raises:
            RecipeError: the storage is not known, or has no groups of this size.
        """
        if self.storage not in FORMAT_OF:
            raise RecipeError(f"--storage {self.storage}: must be one of {', '.join(FORMAT_OF)}")
        model = {"name": self.base, "storage": self.storage, "dtype": self.dtype}
        if self.storage in CODE_BOOKS:
            if self.group_size is not None:
                raise RecipeError(
                    f"--group-size {self.group_size}: {self.storage} has blocks of its own size; leave it out"
                )
            return model
        default = ModelSection.model_fields["group_size"].default
        return {**model, "group_size": default if self.group_size is None else self.group_size}


def merge_adapter(asked: Merge, console: Console, *, as_json: bool = False) -> list[Survival]:
    """Print what survives of an adapter on the grid of a packed base, write the export and the recipe, return the rows.

    Raises:
        ModelError: the adapter is no plain LoRA, or not for this base.
        RecipeError: an option is impossible, or the file of the recipe is taken.
        ExportError: ``out`` is taken, or an update would not survive and ``force`` is not set; the recipe is written.
        DifferenceError: the reloaded export differs by more than its bound.
    """
    model = asked.model()
    adapter = open_adapter(asked.adapter)
    config = config_of(parse_recipe({"model": model}, source="qaft merge-adapter").model)
    names = linear_names(config)
    require_targets(adapter, names, adapter.layers)
    sections = adapter_sections(adapter, model, names)
    recipe = parse_recipe(sections, source="qaft merge-adapter")
    if asked.out is not None:
        check_export(recipe, _export_section(asked, asked.out))
    with loading_memory({"--storage": asked.storage}):
        run = build_run(recipe)
    rows = [layer_survival(name, layer, _grid(run, name, layer)) for name, layer in run.layers.items()]
    told = Console(stderr=True) if as_json else console
    if as_json:
        print(_as_json(asked, adapter, rows))
    else:
        console.print(kind_table(rows), worst_table(rows))
    if asked.recipe is not None or any(map(is_lost, rows)):
        path = asked.recipe or _beside(asked.out or asked.adapter)
        rescue = rescue_sections(adapter, sections, config, data=asked.data, run=path.with_suffix(""))
        write_recipe(rescue, path, force=asked.force)
        _offer(told, asked, path, rows)
    if asked.out is not None:
        export_run(run, _export_section(asked, asked.out), told)
    return rows


def _export_section(asked: Merge, out: Path) -> ExportSection:
    return ExportSection(format=FORMAT_OF[asked.storage], out=str(out), force=asked.force)


def _grid(run: Run, name: str, layer: AdaptedLinear) -> Quantizer:
    """Return the grid that the packed base of a layer is on.

    Raises:
        RecipeError: blocks of that grid reach over rows.
    """
    from qaft.bases.bnb import FourBitBase

    if isinstance(layer.base, FourBitBase):
        storage = run.recipe.model.storage
        if layer.in_features % layer.base.block_size:
            raise RecipeError(
                f"--storage {storage}: {name} has rows of {layer.in_features} weights, which blocks of "
                f"{layer.base.block_size} do not fill; use --storage int4 with a --group-size that divides them"
            )
        return CODE_BOOKS[storage](group_size=layer.base.block_size)
    assert run.loaded.frozen_quantizer is not None
    return run.loaded.frozen_quantizer


def _beside(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}-qat.yaml")


def _as_json(asked: Merge, adapter: LoraFolder, rows: Sequence[Survival]) -> str:
    about = {"adapter": str(asked.adapter), "trained_on": adapter.base, "base": asked.base, "storage": asked.storage}
    return json.dumps({**about, "layers": [asdict(row) for row in rows]}, indent=2)


def _offer(console: Console, asked: Merge, recipe: Path, rows: Sequence[Survival]) -> None:
    command = ["qaft", "train", str(recipe), *([] if asked.data else ["data.train=FILE"])]
    needs = (
        f"it trains on {asked.data}"
        if asked.data
        else "FILE: examples of what the adapter was trained for (.jsonl .json .csv .parquet or a hub id)"
    )
    for line in (
        f"{sum(map(is_lost, rows))} of {len(rows)} layers keep less than {SMALLEST_SHARE:.0%} of their update in "
        f"{asked.storage}. A short run through that grid, which starts from the adapter, saves the rest:",
        f"  {shlex.join(command)}",
        f"  {needs}",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
