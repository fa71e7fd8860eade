"""A folder that appears complete or not at all.

Everything is written to ``<folder>.tmp-<host>-<pid>`` beside it, flushed to the disk, and renamed. After a crash only a
folder with that name is left, which nobody takes for the export and which the next export to the same place removes. It
is locked while it is written: unlike a process id, the lock of a killed process cannot belong to another one later.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qaft.errors import ExportError


@contextmanager
def staged(folder: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes ``folder`` when the block ends without an exception, and vanishes otherwise.

    Args:
        folder: the final place; its parents are created.
        force: replace what is there. It stays until the new folder is complete.

    Raises:
        ExportError: something is at ``folder`` and ``force`` is not set, or it is a file.
    """
    require_free(folder, force=force)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    stage = _beside(folder, "tmp", str(os.getpid()))
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        with _locked(stage):
            yield stage
            for path in sorted(stage.rglob("*")):
                _flush(path)
            _flush(stage)
            _replace(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def require_free(folder: Path, *, force: bool) -> None:
    """Refuse a place that is taken.

    Raises:
        ExportError: something is at ``folder`` and ``force`` is not set, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder}: is a file; give the path of a new folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ExportError(f"{folder}: exists already; give another folder, or force: true to replace it")


def remove_leftovers(folder: Path) -> None:
    """Remove, with a warning, what killed exports to ``folder`` have left on this host.

    What another host writes on a shared disk is left alone: a lock may not reach from one to the other.
    """
    # The folder that was to be replaced is no leftover before another one is in its place.
    marks = [_beside(folder, kind, "").name for kind in ("tmp", *(["old"] if folder.exists() else []))]
    for path in sorted(folder.parent.iterdir()):
        if any(path.name.startswith(mark) and path.name.removeprefix(mark).isdigit() for mark in marks):
            with _locked(path) as mine:
                if mine:
                    shutil.rmtree(path, ignore_errors=True)
                    warnings.warn(f"{path}: removed, a killed export had left it", stacklevel=2)


def restore_replaced(folder: Path) -> None:
    """Bring back, with a warning, a folder that a killed replacement had moved aside before the new one was in place.

    What another host has moved is left alone.
    """
    if folder.exists() or not folder.parent.is_dir():
        return
    mark = _beside(folder, "old", "").name
    for path in sorted(folder.parent.iterdir()):
        if path.name.startswith(mark) and path.name.removeprefix(mark).isdigit():
            with _locked(path) as mine:
                if mine:
                    path.rename(folder)
                    warnings.warn(f"{folder}: brought back from {path}, where a killed process left it", stacklevel=2)
                    return


def _beside(folder: Path, kind: str, pid: str) -> Path:
    return folder.with_name(f"{folder.name}.{kind}-{platform.node()}-{pid}")


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Yield whether this process holds the lock of ``folder`` during the block; False where there are no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)


def _replace(stage: Path, folder: Path) -> None:
    if not folder.exists():
        stage.rename(folder)
        _flush(folder.parent)
        return
    old = _beside(folder, "old", str(os.getpid()))
    with _locked(folder):
        folder.rename(old)
        try:
            stage.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
