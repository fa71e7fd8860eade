"""The course of every export: stage, write, reload and compare, describe, rename."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qaft.evaluate.difference import compare_logits
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
        difference = rounding = None
        if section.verify:
            if lacking := _why_not_reloaded(loaded, written, folder):
                trained, reference = expected_logits(loaded, written)
                rounding = None if reference is trained else compare_logits(trained, reference)
                notes = (f"not reloaded: {lacking}",)
            else:
                found = verify_export(loaded, stage, written)
                difference, rounding, reference = found.difference, found.rounding, found.reference
                notes = found.notes()
            device = next(loaded.model.parameters()).device.type
            Fingerprint.of(reference, device=device).save(stage / FINGERPRINT)
            written = replace(written, notes=(*written.notes, *notes))
        card = model_card(folder.name, section.format, written, info, difference, rounding)
        (stage / "README.md").write_text(card, encoding="utf-8")
        stamp = export_stamp(section.format, written, info, difference, rounding)
        write_json(stage / STAMP, {**stamp, "files": digests(stage, without=STAMP)})
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    return ExportReport(
        folder=folder, files=tuple(sizes), sizes=sizes, notes=written.notes, difference=difference, rounding=rounding
    )


def _why_not_reloaded(loaded: LoadedModel, written: Written, folder: Path) -> str:
    """Return why a fresh process is not asked now, and how it is asked later; empty where it can be asked."""
    if written.unloadable:
        return written.unloadable
    lacking = missing_memory(loaded)
    return f"{lacking}; check it where there is room: qaft export --check-only {folder}" if lacking else ""
