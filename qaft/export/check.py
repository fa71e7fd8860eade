"""Is an exported folder still what was exported? Its files against their digests, a reload against recorded logits.

no patch on it           what the export has recorded
one patch                its digests of the files that it changed, and what the run of the patch has answered
several                  the digests alone: no run has computed that function
the last one taken off   what the export has recorded, again
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qaft.errors import DifferenceError, ExportError
from qaft.export.base import UNBOUNDED, Bound
from qaft.export.card import STAMP
from qaft.export.digests import changes, digests
from qaft.export.fingerprint import FINGERPRINT, Deviation, Fingerprint
from qaft.export.patch_state import STATE, PatchState, read_state
from qaft.export.record import ExportRecord, adapted_model
from qaft.export.staging import restore_replaced
from qaft.export.verify import reload_logits

_EDITABLE = ("README.md",)
"""Files that users change and no loader reads."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What a check of a folder has found.

    Attributes:
        format: the export's format.
        num_files: files whose digests are those of the export, or of the patches on it.
        patches: names of the patches on it.
        bound: the deviation that is allowed.
        deviation: of the reload from the trained model; None where nothing is recorded that it could be compared with.
        uncompared: why nothing is, or empty.
    """

    format: str
    num_files: int
    patches: tuple[str, ...] = ()
    bound: Bound
    deviation: Deviation | None = None
    uncompared: str = ""


@dataclass(frozen=True)
class Expected:
    """What a reload has to answer within ``bound``; without ``answers`` the reason why that is not known."""

    bound: Bound
    answers: Fingerprint | None = None
    why_not: str = ""

    def on(self, device: torch.device | str) -> Bound:
        """Return the bound of a reload on this device, wider where the answers come from another type."""
        if self.answers is None:
            return self.bound
        return self.bound.between(self.answers.device, torch.device(device).type)


def check_export_folder(folder: Path, *, base: Path | None = None, device: torch.device | str = "cpu") -> Check:
    """Return that the folder holds what was exported, and how far a fresh process that loads it is from the run.

    A folder that a killed process has left aside while it put a patch onto it is brought back first.

    Args:
        folder: an export.
        base: for an adapter, the folder of its model; None for the one that it was trained on.
        device: where the fresh process computes.

    Raises:
        ExportError: the folder is no export of qaft, or cannot be loaded.
        DifferenceError: a file is missing, changed or new, or the reload is farther from the trained model than the
            export's bound.
    """
    restore_replaced(folder)
    stamp, state = _stamp(folder), read_state(folder)
    found = digests(folder, without=STAMP)
    own = {name: digest for name, digest in found.items() if name not in (*_EDITABLE, STATE)}
    recorded = {n: digest for n, digest in {**stamp["files"], **state.files}.items() if n not in _EDITABLE}
    if problems := changes(recorded, own):
        raise DifferenceError(f"{folder}: is not what was exported: {'; '.join(problems)}; export the run again")
    expected = expected_of(folder)
    check = Check(
        format=stamp["format"],
        num_files=len(own),
        patches=tuple(patch.name for patch in state.patches),
        bound=expected.on(device),
        uncompared=expected.why_not,
    )
    if expected.answers is None:
        return check
    model, dtype = adapted_model(stamp)
    reloaded = reload_logits(
        folder,
        expected.answers.ids,
        device=device,
        base=None if model is None else base or Path(model),
        dtype=None if dtype is None else getattr(torch, dtype),
    )
    deviation = expected.answers.compare(reloaded)
    check.bound.check(deviation, consequence="the programs that load it have changed; install those of the export")
    return replace(check, deviation=deviation)


def expected_of(folder: Path) -> Expected:
    """Return what an exported folder has to answer: as the run of the patch on it, or as it was exported.

    Raises:
        ExportError: the folder is no export of qaft, or what it records is damaged.
    """
    state = read_state(folder)
    return _expected_of_patches(folder, state) if state.patches else _expected_of_export(folder, _stamp(folder))


def _expected_of_export(folder: Path, stamp: Mapping[str, Any]) -> Expected:
    bound = Bound(**stamp["bound"])
    if stamp["format"] == "patch":
        return Expected(bound, why_not="a patch is loaded on its base: put it there, and check that folder")
    if not (folder / FINGERPRINT).is_file():
        return Expected(bound, why_not="the export was written with verify: false")
    return Expected(bound, Fingerprint.load(folder / FINGERPRINT))


def _expected_of_patches(folder: Path, state: PatchState) -> Expected:
    if len(state.patches) != 1:
        return Expected(UNBOUNDED, why_not="several patches are on it, whose runs have not computed it together")
    (patch,) = state.patches
    if patch.stamp is None or patch.answers is None:
        return Expected(UNBOUNDED, why_not=f"the patch {patch.name} was written with verify: false")
    bound = ExportRecord.of(patch.stamp, folder / STATE).bound
    return Expected(bound, Fingerprint.from_values(patch.answers, folder / STATE))


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
