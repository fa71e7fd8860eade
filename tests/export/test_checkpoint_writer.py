"""Shards: the layout of transformers, one shard in memory, and no finished name before the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qaft.errors import ExportError
from qaft.export import checkpoint_writer
from qaft.export.checkpoint_writer import INDEX, CheckpointWriter, to_dtype


def filled(folder: Path, limit: int, sizes: list[int]) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    tensors = {f"t{i}": torch.randn(size) for i, size in enumerate(sizes)}
    writer = CheckpointWriter(folder, max_shard_bytes=limit)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return tensors, writer.close()


def test_one_shard_has_the_plain_name_and_no_index(tmp_path: Path) -> None:
    tensors, files = filled(tmp_path, 10**6, [3, 4])
    assert files == ("model.safetensors",) and sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_stay_below_the_limit_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    tensors, files = filled(tmp_path, 40, [6, 4, 4, 100, 1])  # 24 | 16 + 16 | 400 | 4 bytes, 24 + 16 = 40 fits
    assert files[:-1] == tuple(f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5))
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * 115
    assert [index["weight_map"][f"t{i}"][6:11] for i in range(5)] == ["00001", "00001", "00002", "00003", "00004"]
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_at_most_one_shard_and_one_tensor_are_held(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, max_shard_bytes=4000)
    for i in range(20):
        writer.add(f"t{i}", torch.zeros(500))
        assert sum(t.nbytes for t in writer._pending.values()) <= 4000


def test_a_view_is_written_without_the_storage_it_is_cut_from(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, max_shard_bytes=10**6)
    source = torch.arange(1000.0).view(100, 10)
    writer.add("row", source[3])
    writer.add("transposed", source[:2].T)
    writer.close()
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["row"], source[3]) and torch.equal(found["transposed"], source[:2].T)
    assert (tmp_path / "model.safetensors").stat().st_size < 1000


def test_no_finished_name_exists_before_the_end(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, max_shard_bytes=16)
    for i in range(3):
        writer.add(f"t{i}", torch.zeros(4))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, max_shard_bytes=16)
    writer.add("t", torch.zeros(1))
    with pytest.raises(ValueError, match="t was written before"):
        writer.add("t", torch.zeros(1))


def test_a_full_disk_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "save_tensors", full)
    writer = CheckpointWriter(tmp_path, max_shard_bytes=4)
    writer.add("a", torch.zeros(1))
    with pytest.raises(OSError, match="No space left"):
        writer.add("b", torch.zeros(1))


def test_integers_keep_their_dtype_and_infinities_are_refused() -> None:
    codes = torch.tensor([1, 2], dtype=torch.int32)
    assert to_dtype("codes", codes, torch.bfloat16) is codes
    with pytest.raises(ExportError, match=r"w: values exceed the range of torch\.float16"):
        to_dtype("w", torch.tensor([70000.0]), torch.float16)
