"""A checkpoint folder that is either complete and checked, or not there.

    checkpoint-<step>.tmp/   written, flushed to disk, read back and compared; then renamed to
    checkpoint-<step>/       trainables.safetensors       trained parameters, and the rows or columns that they are
                             training_state.safetensors   tensors of optimizer, gradient source, random generators
                             trainer_state.json           the rest (see encoding.py; no pickle anywhere)
                             manifest.json                bytes and SHA-256 of files, shapes of parameters

A crash, a kill or a full disk at any point leaves the checkpoints that were there. The frozen base is never written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qaft.errors import TrainingError
from qaft.tensor_file import save_tensors
from qaft.train.encoding import decode, encode

TRAINABLES, STATE_TENSORS, STATE, MANIFEST = (
    "trainables.safetensors",
    "training_state.safetensors",
    "trainer_state.json",
    "manifest.json",
)
_NAME = re.compile(r"checkpoint-(\d+)")
_FORMAT = 1

TensorWriter = Callable[[Mapping[str, Tensor], Path], None]
"""Writes named tensors to a path; tests inject slow and failing ones."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a run needs to go on: finished steps, trainables by name, and nested state (tensors allowed).

    ``trainables`` are the trained parameters and the persistent buffers of updates: which rows they belong to.
    """

    step: int
    trainables: Mapping[str, Tensor]
    state: Mapping[str, Any]


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of ``step`` in a run folder."""
    return folder / f"checkpoint-{step}"


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int, write: TensorWriter = write_tensors) -> Path:
    """Write ``checkpoint`` into the run folder, check it, then drop all but the ``keep`` newest; return its path.

    A complete checkpoint of the same step is left as it is.

    Raises:
        TrainingError: the disk is full or refuses, what was read back is not what was written, or a parameter is
            empty or not finite. Earlier checkpoints are untouched and nothing half-written stays.
    """
    final = checkpoint_path(folder, checkpoint.step)
    if final.is_dir() and problem_with(final) is None:
        return final
    for leftover in folder.glob("checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = final.with_name(f"{final.name}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_files(temporary, checkpoint, write)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _flush(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise TrainingError(_cannot_write(final, checkpoint, error)) from error
        raise
    _prune(folder, newest=checkpoint.step, keep=keep)
    return final


def _write_files(folder: Path, checkpoint: Checkpoint, write: TensorWriter) -> None:
    trainables = {name: param.detach() for name, param in checkpoint.trainables.items()}
    _check_values(trainables, folder)
    tensors: dict[str, Tensor] = {}
    state = {"global_step": checkpoint.step, "state": encode(checkpoint.state, "state", tensors)}
    for name, content in ((TRAINABLES, trainables), (STATE_TENSORS, tensors)):
        write(content, folder / name)
        _flush(folder / name)
        _check_equal(content, folder / name)
    _write_json(folder / STATE, state)
    parameters = {n: {"shape": list(p.shape), "dtype": str(p.dtype)} for n, p in trainables.items()}
    files = {name: _fingerprint(folder / name) for name in (TRAINABLES, STATE_TENSORS, STATE)}
    manifest = {"format": _FORMAT, "step": checkpoint.step, "files": files, "trainables": parameters}
    _write_json(folder / MANIFEST, manifest)
    _flush(folder)


def _check_values(trainables: Mapping[str, Tensor], folder: Path) -> None:
    if not trainables:
        raise TrainingError(f"{folder.stem}: there is no trained parameter to save; this is a defect, please report it")
    for name, param in trainables.items():
        # Integers are choices of rows or columns, and an update may have chosen none on one axis.
        if not param.is_floating_point():
            continue
        if param.numel() == 0 or not bool(torch.isfinite(param).all()):
            reason = "is empty" if param.numel() == 0 else "holds values that are not finite"
            raise TrainingError(
                f"{folder.stem}: {name} {list(param.shape)} {reason}, so nothing was written; "
                "go on from the last good checkpoint with train.resume=true and a lower optim.lr"
            )


def _check_equal(content: Mapping[str, Tensor], path: Path) -> None:
    stored = load_file(path)
    for name, tensor in content.items():
        copy = stored.get(name)
        # As bytes: NaN in an optimizer's scratch state equals itself.
        if copy is None or copy.shape != tensor.shape or not torch.equal(_bytes(copy), _bytes(tensor.cpu())):
            raise TrainingError(f"{path}: {name} reads back different from what was written; check the disk")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _cannot_write(path: Path, checkpoint: Checkpoint, error: Exception) -> str:
    needed = sum(tensor.nbytes for tensor in checkpoint.trainables.values()) / 2**20
    try:
        free = f"{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free"
    except OSError:
        free = "free space unknown"
    last = latest_checkpoint(path.parent)
    return (
        f"{path}: cannot be written: {error} ({free}; parameters {needed:.1f} MiB, optimizer state on top). "
        f"Last good checkpoint: {last or 'none'}. Free space, lower train.keep or train.output elsewhere; "
        "then continue with train.resume=true"
    )


def _prune(folder: Path, *, newest: int, keep: int) -> None:
    # Checkpoints after `newest` are damaged ones that a resume has skipped; they must not push good ones out.
    steps = [step for step in _steps(folder) if step <= newest]
    for step in steps[keep:]:
        shutil.rmtree(checkpoint_path(folder, step), ignore_errors=True)


def _steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoint folders, newest first."""
    names = (path.name for path in folder.glob("checkpoint-*") if path.is_dir())
    return sorted((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), reverse=True)


def problem_with(path: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None when every file has the bytes of its manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            return f"its format is {manifest['format']}, this version reads {_FORMAT}"
        for name in (TRAINABLES, STATE_TENSORS, STATE):
            expected = manifest["files"][name]
            if (path / name).stat().st_size != expected["bytes"] or _fingerprint(path / name) != expected:
                return f"{name} is not what was written (SHA-256 differs from {MANIFEST})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"incomplete: {type(error).__name__}: {error}"
    return None


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files are intact, or None; damaged ones are passed over with a warning."""
    for step in _steps(folder):
        path = checkpoint_path(folder, step)
        problem = problem_with(path)
        if problem is None:
            return path
        warnings.warn(f"{path} is passed over: {problem}", stacklevel=2)
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in ``path``, on the CPU.

    Raises:
        TrainingError: it is incomplete or damaged.
    """
    problem = problem_with(path)
    if problem is not None:
        raise TrainingError(f"{path}: {problem}; use an earlier checkpoint")
    stored = json.loads((path / STATE).read_text(encoding="utf-8"))
    state = decode(stored["state"], load_file(path / STATE_TENSORS))
    return Checkpoint(step=stored["global_step"], trainables=load_file(path / TRAINABLES), state=state)
