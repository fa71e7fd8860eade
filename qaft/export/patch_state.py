"""``qaft_patches.json``: which patches are on a packed checkpoint, what each answers, and the files that they changed.

It appears and goes with the folder that it describes (see ``patch_folder.py``), so a check always finds digests that
belong to the rows. Without a patch the file is not there. What the base has recorded of itself stays as it is: after
the last patch is taken off, that is what a check compares with again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qaft.errors import ExportError
from qaft.export.hf_files import write_json

STATE = "qaft_patches.json"


@dataclass(frozen=True)
class AppliedPatch:
    """A patch that is on a folder.

    Attributes:
        name: what the user calls it.
        key: SHA-256 of its tensors.
        rows: indices by layer.
        stamp: what its export has recorded of itself, see ``ExportRecord``; None where that is not known.
        answers: what its run has answered, see ``Fingerprint``; None when it was exported with ``verify: false``.
    """

    name: str
    key: str
    rows: Mapping[str, list[int]]
    stamp: Mapping[str, Any] | None = None
    answers: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PatchState:
    """The ``patches`` on a folder in the order in which they came, and ``files``, the SHA-256 of those they changed."""

    patches: tuple[AppliedPatch, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the state into ``folder``, or remove it where no patch is on it."""
        if self.patches:
            write_json(folder / STATE, asdict(self))
        else:
            (folder / STATE).unlink(missing_ok=True)


def read_state(folder: Path) -> PatchState:
    """Return the patches on a folder; none where it says nothing of patches.

    Raises:
        ExportError: the file is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        return PatchState()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return PatchState(tuple(AppliedPatch(**entry) for entry in values["patches"]), values["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path}: not readable ({error!r}); it says which patches are on the folder") from error
