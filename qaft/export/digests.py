"""SHA-256 of every file of an exported folder: recorded when it is written, compared when it is checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path, *, without: str = "") -> dict[str, str]:
    """Return relative path -> SHA-256 (hex) of every file below ``folder`` but ``without``."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / without:
            found[path.relative_to(folder).as_posix()] = file_digest(path)
    return found


def changes(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return what is missing, changed or new, one phrase per file."""
    lines = [f"{name} is missing" for name in recorded if name not in found]
    lines += [f"{name} has changed" for name, digest in recorded.items() if found.get(name, digest) != digest]
    return lines + [f"{name} is new" for name in found if name not in recorded]
