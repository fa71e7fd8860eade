"""Resident memory of a process above what it held at a mark, on Linux, without what the C allocator keeps by chance."""

from __future__ import annotations

import re
import sys
from pathlib import Path

RESET = Path("/proc/self/clear_refs")
SUPPORTED = RESET.exists()
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""Environment of a measured process. By itself glibc comes to serve blocks of up to 32 MiB from a heap whose holes stay
resident: of one and the same export it then says 27 or 53 MB. Tensors of a real model are above that limit and return
to the system when freed; with the threshold fixed, those of a small model do too."""


class Mark:
    """The resident memory of now; what comes after is counted from here.

    Raises:
        PermissionError: the system does not let a process reset its high-water mark.
    """

    def __init__(self) -> None:
        RESET.write_text("5")
        self._before = _bytes("VmRSS")

    def peak(self) -> int:
        """Bytes of the highest point since."""
        return _bytes("VmHWM") - self._before

    def now(self) -> int:
        """Bytes held now."""
        return _bytes("VmRSS") - self._before


def search_path(*folders: Path) -> dict[str, str]:
    """``PYTHONPATH`` of a measured process: this folder, the folders given and those this process searches."""
    return {"PYTHONPATH": ":".join(map(str, [Path(__file__).parent, *folders, *filter(None, sys.path)]))}


def _bytes(field: str) -> int:
    found = re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, field
    return 1024 * int(found[1])
