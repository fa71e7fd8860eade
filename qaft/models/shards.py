"""Which safetensors file of a folder holds which tensor, and reading one tensor without keeping its file mapped."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qaft.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LFS_POINTER = b"version https://git-lfs"


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the safetensors files that make up the checkpoint; they need not exist.

    Raises:
        ModelError: the index is not readable.
    """
    index = folder / INDEX
    if not index.is_file():
        return (WEIGHTS,)
    try:
        return tuple(sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index}: not a readable index ({error!r}); download it again") from error


def locate_tensors(folder: Path) -> dict[str, Path]:
    """Return tensor name -> file for every tensor of the checkpoint, in the order of the files.

    Raises:
        ModelError: there are no safetensors, or a file is missing, truncated or something else.
    """
    files = [folder / name for name in weight_files(folder)]
    missing = [path.name for path in files if not path.is_file()]
    if missing == [WEIGHTS]:
        raise ModelError(_no_safetensors(folder))
    if missing:
        raise ModelError(f"{folder}: {', '.join(missing)} of {INDEX} missing; download the checkpoint again")
    located: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                located.update(dict.fromkeys(file.keys(), path))
        except (OSError, SafetensorError) as error:
            raise ModelError(_unreadable(path, error)) from error
    return located


def read_tensor(path: Path, name: str) -> Tensor:
    """Return one tensor in memory of its own.

    The file is mapped only during the call: the pages of a mapping stay resident until it is closed, so that an open
    file would grow to the whole shard.

    Raises:
        ModelError: the file is no longer readable.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name).clone()
    except (OSError, SafetensorError) as error:
        raise ModelError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        return f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` in {path.parent}"
    return f"{path}: not a complete safetensors file, {path.stat().st_size} bytes ({error}); download it again"


def _no_safetensors(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f"{folder}: an adapter without its base model; merge it into the base first, or give the base"
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        convert = (
            f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(folder)!r}, dtype='auto')"
            f".save_pretrained({str(folder) + '-safetensors'!r})"
        )
        return (
            f"{folder}: weights only as {pickled[0]}, a format that can execute code; if you trust them, convert them "
            f'once: python -c "{convert}" and copy the tokenizer files'
        )
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    return f"{folder}: no {WEIGHTS} and no {INDEX} (safetensors found: {', '.join(found) or 'none'})"
