"""A folder that appears complete or not at all.

Everything is written to ``<folder>.tmp-<pid>`` beside it, flushed to the disk, and renamed. After a crash only a folder
with that name is left, which nobody takes for the export.
"""

from __future__ import annotations

import os
import shutil
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
    stage = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
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


def _replace(stage: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    try:
        stage.rename(folder)
    except OSError:
        if old.exists():
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
