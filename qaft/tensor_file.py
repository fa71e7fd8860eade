"""Writing a safetensors file as any other file is written: readable to whom the process's umask allows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors to ``path``.

    Raises:
        OSError: the file cannot be written (as SafetensorError, where safetensors finds out).
    """
    # safetensors renames a private temporary file (mode 0600); a file that is created plainly has the mode to be given.
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)
