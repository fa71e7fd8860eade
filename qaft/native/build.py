"""One C++ file of this folder as a library: compiled at first use, kept in the user's cache.

Where there is no compiler, or it fails, there is no library, and the caller computes the same numbers in torch. Tensors
are passed as addresses, so the files need no headers but their own, and compile in two seconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
"""No -ffast-math: sums stay in their order. Products are fused with sums only where that is exact (see the sources)."""

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
_OF_CPU = {"AVX2": ("-mavx2", "-mfma"), "AVX512": ("-mavx2", "-mfma", *_AVX512)}


def compiler() -> str | None:
    """Return the path of the C++ compiler: ``CXX``, else g++, else clang++; None where there is none."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@cache
def library(name: str) -> ctypes.CDLL | None:
    """Return ``<name>.cpp`` of this folder, compiled for this CPU; None where that is not possible.

    A compiler that fails is reported in a warning.
    """
    path = compiler()
    if path is None or os.name != "posix":
        return None
    try:
        return ctypes.CDLL(str(_compiled(_FOLDER / f"{name}.cpp", path)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(f"{name}.cpp cannot be compiled ({path}), torch will do its work: {detail}", stacklevel=2)
        return None


def address(x: torch.Tensor) -> ctypes.c_void_p:
    """Return where the numbers of ``x`` begin, as a kernel takes it."""
    return ctypes.c_void_p(x.data_ptr())


def _compiled(source: Path, path: str) -> Path:
    flags = (*_FLAGS, *_OF_CPU.get(torch.backends.cpu.get_cpu_capability(), ()))
    text = b"".join(file.read_bytes() for file in (source, *sorted(_FOLDER.glob("*.h"))))
    key = hashlib.sha256(repr((path, flags, platform.machine())).encode() + text).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qaft"
    target = folder / f"{source.stem}-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            command = [path, *flags, "-o", str(built), str(source)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            # Whole or not at all: several processes may compile at once.
            built.replace(target)
    return target
