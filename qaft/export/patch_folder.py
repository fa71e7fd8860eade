"""Put a patch onto a packed checkpoint folder, and take it off: rows of bytes exchanged in copies of the shards.

The folder that results appears as a whole (see ``staging.py``), also in place: shards without touched rows are linked,
the others copied and changed, and the new folder is renamed over the old one. A model server that has the old files
open keeps them. ``qaft_patches.json`` in the folder says which patches are on it (``patch_state.py``); without any it
is not there, and every file is byte for byte that of the base.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qaft.errors import ExportError
from qaft.export.digests import file_digest
from qaft.export.patch_file import Patch, digest
from qaft.export.patch_state import AppliedPatch, PatchState, read_state
from qaft.export.record import ExportRecord, read_stamp
from qaft.export.row_bytes import holds, put_rows, tensor_bytes
from qaft.export.staging import restore_replaced, staged
from qaft.models.shards import locate_tensors

_SHOWN = 3


def apply_patch(patch: Patch, base: Path, out: Path | None) -> Path:
    """Put ``patch`` onto the packed checkpoint ``base``; return the folder that is the trained model.

    Args:
        patch: what to apply.
        base: the shared base, which may have other patches on it.
        out: a new folder; None to change ``base`` itself.

    Raises:
        ExportError: the patch is on the folder already, another one holds rows of it, the base is another one or
            quantizes inputs otherwise, or ``out`` exists.
        ModelError: the folder is no checkpoint.
    """
    with _opened(base, in_place=out is None) as base:
        state = read_state(base)
        _require_free_rows(patch, state.patches, base)
        _require_base(patch, state.patches, base)
        _require_same_inputs(patch, base)
        rows = {n: p.rows.tolist() for n, p in patch.layers.items()}
        stamp = None if patch.stamp is None else {k: v for k, v in patch.stamp.items() if k != "files"}
        entry = AppliedPatch(patch.name, patch.key, rows, stamp, patch.answers)
        state = replace(state, patches=(*state.patches, entry))
        return _rewritten(base, out, patch, {n: p.new for n, p in patch.layers.items()}, state)


def revert_patch(patch: Patch, folder: Path, out: Path | None) -> Path:
    """Take ``patch`` off a folder; return the folder that is what it was before.

    Args:
        patch: what to take off.
        folder: a checkpoint that it was put onto.
        out: a new folder; None to change ``folder`` itself.

    Raises:
        ExportError: the patch is not on the folder, its rows were changed since, or ``out`` exists.
        ModelError: the folder is no checkpoint.
    """
    with _opened(folder, in_place=out is None) as folder:
        state = read_state(folder)
        others = tuple(entry for entry in state.patches if entry.key != patch.key)
        if len(others) == len(state.patches):
            on = ", ".join(entry.name for entry in state.patches) or "none"
            raise ExportError(f"{folder}: the patch {patch.name} is not on it (patches on it: {on}); nothing to revert")
        shards = locate_tensors(folder)
        changed = [n for n, p in patch.layers.items() if not holds(shards, n, p, p.new)]
        if changed:
            raise ExportError(f"{folder}: rows of {_listing(changed)} were changed after {patch.name} was put onto it")
        return _rewritten(
            folder, out, patch, {n: p.old for n, p in patch.layers.items()}, replace(state, patches=others)
        )


@contextmanager
def _opened(folder: Path, *, in_place: bool) -> Iterator[Path]:
    """Yield the real path of a folder, locked when it is to be changed.

    Raises:
        ExportError: there is no such folder, or another process is changing it.
    """
    restore_replaced(folder)
    folder = folder.resolve()
    if not folder.is_dir():
        raise ExportError(f"{folder}: no such folder; give a packed checkpoint, as `qaft patch base` writes it")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if in_place:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BlockingIOError as error:
        raise ExportError(f"{folder}: another process is changing it; wait for it and run again") from error
    finally:
        os.close(descriptor)


def _require_free_rows(patch: Patch, applied: Sequence[AppliedPatch], folder: Path) -> None:
    for entry in applied:
        if entry.key == patch.key:
            raise ExportError(f"{folder}: the patch {entry.name} is on it already; nothing was changed")
        for name, layer in patch.layers.items():
            common = sorted(set(layer.rows.tolist()) & set(entry.rows.get(name, [])))
            if common:
                raise ExportError(
                    f"{folder}: {patch.name} and {entry.name}, which is on it, both change rows "
                    f"{_listing(list(map(str, common)))} of {name}; revert {entry.name} first"
                )


def _require_base(patch: Patch, applied: Sequence[AppliedPatch], folder: Path) -> None:
    """Refuse a folder that is not the base of the patch, but for what other patches have changed."""
    shards = locate_tensors(folder)
    elsewhere = {name for entry in applied for name in entry.rows}
    missing = [name for name in patch.base if name not in shards]
    wrong = missing or [
        name
        for name, expected in patch.base.items()
        if not any(name.startswith(f"{layer}.") for layer in elsewhere)
        and digest(tensor_bytes(shards[name], name)) != expected
    ]
    wrong = wrong or [n for n, layer in patch.layers.items() if not holds(shards, n, layer, layer.old)]
    if wrong:
        problem = "are missing" if missing else "differ in their bytes"
        raise ExportError(
            f"{folder}: not the base of {patch.name}: {len(wrong)} tensors {problem}, {_listing(wrong)}; give the base "
            "of the run, which `qaft patch base RUN` writes"
        )


def _require_same_inputs(patch: Patch, folder: Path) -> None:
    """Refuse a base with the right weights that rounds inputs otherwise than the run: it is another function."""
    stamp = read_stamp(folder)
    if stamp is None or patch.stamp is None:
        return
    base, trained = ExportRecord.of(stamp, folder), ExportRecord.of(patch.stamp, Path(patch.name))
    if (base.input_bits, base.inputs) != (trained.input_bits, trained.inputs):
        raise ExportError(
            f"{folder}: not the base of {patch.name}: its layers read {_inputs(base)}, those of the run "
            f"{_inputs(trained)}; give the base of the run, which `qaft patch base RUN` writes"
        )


def _inputs(record: ExportRecord) -> str:
    bits = " and ".join(str(width or 16) for width in sorted(record.input_bits, key=lambda width: width or 16))
    return f"inputs of {bits} bits{f' as {record.inputs} rounds them' if record.inputs else ''}"


def _rewritten(
    folder: Path, out: Path | None, patch: Patch, rows: Mapping[str, Mapping[str, Any]], state: PatchState
) -> Path:
    """Return the folder with these rows, and with the patches of ``state``."""
    shards = locate_tensors(folder)
    touched = {shards[f"{name}.{part}"].resolve() for name, parts in rows.items() for part in parts}

    def put(source: str, target: str) -> None:
        # A link would be one file in two folders; where the old folder goes away it saves a copy.
        real = Path(source).resolve()
        if out is not None or real in touched:
            shutil.copyfile(real, target)
        else:
            os.link(real, target)

    target = folder if out is None else out
    with staged(target, force=out is None) as stage:
        shutil.copytree(folder, stage, copy_function=put, dirs_exist_ok=True)
        copies = {name: stage / path.relative_to(folder) for name, path in shards.items()}
        for name, layer in patch.layers.items():
            put_rows(copies, name, layer, rows[name])
        if not state.patches:
            _require_untouched(patch, copies)
        changed = {copies[f"{name}.{part}"] for name, parts in rows.items() for part in parts}
        files = {path.relative_to(stage).as_posix(): file_digest(path) for path in sorted(changed)}
        replace(state, files={**state.files, **files}).save(stage)
    return target


def _require_untouched(patch: Patch, shards: Mapping[str, Path]) -> None:
    for name, layer in patch.layers.items():
        for part in layer.old:
            tensor = f"{name}.{part}"
            if digest(tensor_bytes(shards[tensor], tensor)) != patch.base[tensor]:
                raise ExportError(f"{tensor}: is not that of the base without {patch.name}; nothing was changed")


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
