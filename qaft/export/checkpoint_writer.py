"""Safetensors shards in the layout of transformers, written while the tensors arrive: only one shard is in memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from qaft.errors import ExportError
from qaft.tensor_file import save_tensors

INDEX = "model.safetensors.index.json"


class CheckpointWriter:
    """Collects tensors and writes a shard whenever the next tensor would make it too large.

    Names are final only in ``close``, because they hold the number of shards.

    Args:
        folder: an existing folder.
        max_shard_bytes: largest file, but for a single tensor that is larger.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int) -> None:
        self._folder = folder
        self._limit = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shard_of: dict[str, int] = {}
        self._num_shards = 0
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it must not be changed until the writer is closed.

        Raises:
            ValueError: the name was added before.
            OSError: a shard cannot be written.
        """
        if name in self._shard_of:
            raise ValueError(f"{name} was written before")
        # A view would keep (and, in safetensors, write) the storage that it is cut from.
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        if self._pending and self._pending_bytes + tensor.nbytes > self._limit:
            self._flush()
        self._shard_of[name] = self._num_shards
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> tuple[str, ...]:
        """Write what is left, give the files their names, and return these; the index is written last.

        Raises:
            OSError: a file cannot be written.
        """
        self._flush()
        if self._num_shards == 1:
            self._partial(0).rename(self._folder / "model.safetensors")
            return ("model.safetensors",)
        names = [f"model-{i + 1:05d}-of-{self._num_shards:05d}.safetensors" for i in range(self._num_shards)]
        for shard, name in enumerate(names):
            self._partial(shard).rename(self._folder / name)
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": {name: names[shard] for name, shard in sorted(self._shard_of.items())},
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return (*names, INDEX)

    def _partial(self, shard: int) -> Path:
        return self._folder / f"model-{shard + 1:05d}.partial"

    def _flush(self) -> None:
        if not self._pending:
            return
        save_tensors(self._pending, self._partial(self._num_shards), metadata={"format": "pt"})
        self._pending, self._pending_bytes = {}, 0
        self._num_shards += 1


def shard_bytes(max_shard_gb: float) -> int:
    """Return the recipe's GiB per file as bytes."""
    return int(max_shard_gb * 2**30)


def to_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` in ``dtype``; integers keep theirs.

    Raises:
        ExportError: a value is not finite there.
    """
    if not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    if torch.isfinite(result).all():
        return result
    if torch.isfinite(tensor).all():
        raise ExportError(f"{name}: values exceed the range of {dtype}; export dtype: bfloat16 or float32")
    raise ExportError(f"{name}: holds values that are not finite; the run diverged, export an earlier checkpoint")
