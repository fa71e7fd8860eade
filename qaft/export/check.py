"""Is an exported folder still what was exported? Its files against their digests, a reload against recorded logits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qaft.errors import DifferenceError, ExportError
from qaft.export.base import Bound
from qaft.export.card import STAMP
from qaft.export.digests import changes, digests
from qaft.export.fingerprint import FINGERPRINT, Deviation, Fingerprint
from qaft.export.verify import reload_logits

_EDITABLE = ("README.md",)
"""Files that users change and no loader reads."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What a check of a folder has found.

    Attributes:
        format: the export's format.
        num_files: files whose digests are those of the export.
        bound: the deviation that is allowed.
        deviation: of the reload from the trained model; None when the export was written without ``verify``.
    """

    format: str
    num_files: int
    bound: Bound
    deviation: Deviation | None


def check_export_folder(folder: Path, *, base: Path | None = None, device: torch.device | str = "cpu") -> Check:
    """Return that the folder holds what was exported, and how far a fresh process that loads it is from the run.

    Args:
        folder: an export.
        base: for an adapter, the folder of its model; None for the one that it was trained on.
        device: where the fresh process computes.

    Raises:
        ExportError: the folder is no export of qaft, or cannot be loaded.
        DifferenceError: a file is missing, changed or new, or the reload is farther from the trained model than the
            export's bound.
    """
    stamp = _stamp(folder)
    found = digests(folder, without=STAMP)
    own = {name: digest for name, digest in found.items() if name not in _EDITABLE}
    recorded = {name: digest for name, digest in stamp["files"].items() if name not in _EDITABLE}
    if problems := changes(recorded, own):
        raise DifferenceError(f"{folder}: is not what was exported: {'; '.join(problems)}; export the run again")
    bound = Bound(**stamp["bound"])
    if FINGERPRINT not in found:
        return Check(format=stamp["format"], num_files=len(own), bound=bound, deviation=None)
    fingerprint = Fingerprint.load(folder / FINGERPRINT)
    adapts = stamp["format"] == "peft"
    reloaded = reload_logits(
        folder,
        fingerprint.ids,
        device=device,
        base=(base or Path(stamp["base_model"])) if adapts else None,
        dtype=getattr(torch, stamp["recipe"]["model"].get("dtype", "bfloat16")) if adapts else None,
    )
    deviation = fingerprint.compare(reloaded)
    bound.check(deviation, consequence="the programs that load it have changed; install those of the export")
    return Check(format=stamp["format"], num_files=len(own), bound=bound, deviation=deviation)


def _stamp(folder: Path) -> dict[str, Any]:
    path = folder / STAMP
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{folder}: is no export of qaft ({STAMP}: {error}); give a folder that qaft wrote"
        ) from error
    if missing := {"format", "files", "bound", "base_model", "recipe"} - set(stamp):
        raise ExportError(f"{path}: lacks {', '.join(sorted(missing))}; it was written by an older qaft: export again")
    return stamp
