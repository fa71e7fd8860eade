"""What an exported folder records of itself, read back: the bound that it kept, and what it was compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaft.errors import ExportError
from qaft.export.base import Bound, InputFunction
from qaft.export.patch_state import read_state
from qaft.models.served import STAMP


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """A part of the stamp of an export.

    Attributes:
        format: the key in ``EXPORTERS``.
        bound: how far a reload may be from what was exported.
        inputs: whose function rounds the inputs of layers; None for 16-bit inputs.
        input_bits: widths of the inputs of layers on a grid, None among them for 16 bits.
        rounded: whether the export rounds the weights of the run, so that the bound is not one to the run itself.
        recipe: of the run; None for a model as it is before training.
    """

    format: str
    bound: Bound
    inputs: InputFunction | None
    input_bits: frozenset[int | None]
    rounded: bool
    recipe: Mapping[str, Any] | None

    @classmethod
    def of(cls, stamp: Mapping[str, Any], where: Path) -> ExportRecord:
        """Return the record in a stamp.

        Args:
            stamp: as ``card.export_stamp`` makes it.
            where: the file that it was read from, for the message.

        Raises:
            ExportError: it is damaged, or an older version wrote it.
        """
        try:
            return cls(
                format=stamp["format"],
                bound=Bound(**stamp["bound"]),
                inputs=stamp["inputs"],
                input_bits=frozenset(grid.get("inputs") for grid in stamp["grids"]),
                rounded=stamp["rounded"],
                recipe=stamp["recipe"] if stamp["trained"] else None,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ExportError(f"{where}: is no record of this version ({error}); export the run again") from error

    def is_of(self, recipe: Mapping[str, Any]) -> bool:
        """Return whether it is an export of the run that this resolved recipe has trained."""
        return self.recipe is not None and _training(self.recipe) == _training(recipe)


def _training(recipe: Mapping[str, Any]) -> Any:
    """Return what of a recipe decides the trained model, as a stamp holds it: not what is exported or continued."""
    parts = {name: section for name, section in recipe.items() if name != "export"}
    train = {key: value for key, value in recipe.get("train", {}).items() if key != "resume"}
    return json.loads(json.dumps({**parts, "train": train}, default=str))


def read_stamp(folder: Path) -> Mapping[str, Any] | None:
    """Return what an exported folder has recorded of itself when it was written, or None where there is no record.

    Raises:
        ExportError: it is no JSON object.
    """
    path = folder / STAMP
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ExportError(f"{path}: is no record of this version ({error}); export the run again") from error


def adapted_model(stamp: Mapping[str, Any]) -> tuple[str, str] | tuple[None, None]:
    """Return the model that an exported adapter is put on and the dtype of that; nothing where all weights are there.

    Args:
        stamp: as ``read_stamp`` returns it.
    """
    if stamp["format"] != "peft":
        return None, None
    return stamp["base_model"], stamp["recipe"]["model"].get("dtype", "bfloat16")


def read_record(folder: Path) -> ExportRecord | None:
    """Return the record of an exported folder, or None where there is none.

    With a patch on it a folder is what the run of the patch has exported. With several it is what no run has computed,
    and has no record.

    Raises:
        ExportError: it is damaged, or an older version wrote it.
    """
    patches = read_state(folder).patches
    if len(patches) > 1:
        return None
    stamp = patches[0].stamp if patches else read_stamp(folder)
    return None if stamp is None else ExportRecord.of(stamp, folder / STAMP)
