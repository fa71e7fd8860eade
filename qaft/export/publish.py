"""The course of every export: stage, write, reload and compare, describe, rename."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qaft.export.activations import activation_notes
from qaft.export.base import ExportInfo, ExportReport, Written
from qaft.export.card import STAMP, export_stamp, model_card
from qaft.export.digests import digests
from qaft.export.fingerprint import FINGERPRINT, Fingerprint
from qaft.export.hf_files import write_json
from qaft.export.staging import staged
from qaft.export.verify import expected_logits, missing_memory, verify_export

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel
    from qaft.sections import ExportSection


def publish(
    loaded: LoadedModel,
    section: ExportSection,
    folder: Path,
    info: ExportInfo,
    *,
    write: Callable[[Path], Written],
) -> ExportReport:
    """Let ``write`` fill a staging folder, verify it, and make it ``folder``.

    Raises:
        ExportError: the folder exists without ``section.force``, or the export cannot be loaded.
        DifferenceError: the reload differs by more than its bound.
        OSError: the disk; nothing is left in any of these cases.
    """
    with staged(folder, force=section.force) as stage:
        written = write(stage)
        told = activation_notes(loaded.model, inputs_written=written.inputs is not None)
        written = replace(written, notes=(*info.notes, *written.notes, *told))
        # A fresh process reads in it whose function rounds the inputs.
        write_json(stage / STAMP, export_stamp(section.format, written, info, None, None))
        lacking = missing_memory(loaded) if section.verify else ""
        verification = verify_export(loaded, stage, written) if section.verify and not lacking else None
        difference = None if verification is None else verification.difference
        rounding = None if verification is None else verification.rounding
        if verification is not None:
            written = replace(written, notes=(*written.notes, *verification.notes()))
            Fingerprint.of(verification.reference).save(stage / FINGERPRINT)
        elif lacking:
            Fingerprint.of(expected_logits(loaded, written)[1]).save(stage / FINGERPRINT)
            note = f"not reloaded: {lacking}; check it where there is room: qaft export --check-only {folder}"
            written = replace(written, notes=(*written.notes, note))
        card = model_card(folder.name, section.format, written, info, difference, rounding)
        (stage / "README.md").write_text(card, encoding="utf-8")
        stamp = export_stamp(section.format, written, info, difference, rounding)
        write_json(stage / STAMP, {**stamp, "files": digests(stage, without=STAMP)})
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    return ExportReport(
        folder=folder, files=tuple(sizes), sizes=sizes, notes=written.notes, difference=difference, rounding=rounding
    )
