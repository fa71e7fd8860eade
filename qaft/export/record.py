"""What an exported folder records of itself, read back: the bound that it kept, and what it was compared with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qaft.errors import ExportError
from qaft.export.base import Bound, InputFunction
from qaft.models.served import STAMP


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """A part of the stamp of an export.

    Attributes:
        format: the key in ``EXPORTERS``.
        bound: how far a reload may be from what was exported.
        inputs: whose function rounds the inputs of layers; None for 16-bit inputs.
        rounded: whether the export rounds the weights of the run, so that the bound is not one to the run itself.
    """

    format: str
    bound: Bound
    inputs: InputFunction | None
    rounded: bool


def read_record(folder: Path) -> ExportRecord | None:
    """Return the record of an exported folder, or None where there is none.

    Raises:
        ExportError: it is damaged, or an older version wrote it.
    """
    path = folder / STAMP
    if not path.is_file():
        return None
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
        return ExportRecord(
            format=stamp["format"],
            bound=Bound(**stamp["bound"]),
            inputs=stamp["inputs"],
            rounded=stamp["rounding"] is not None,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path}: is no record of this version ({error}); export the run again") from error
