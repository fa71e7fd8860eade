from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny_run import ENVIRONMENT
from torch import Tensor

from qaft.errors import TrainingError
from qaft.train.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    problem_with,
    read_checkpoint,
    write_checkpoint,
    write_tensors,
)


def checkpoint(step: int, size: int = 50) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weights = {
        "layer.up": torch.randn(size, generator=generator),
        "layer.down": torch.randn(3, size, generator=generator),
    }
    state = {"optimizer": {"state": {0: {"exp_avg": torch.rand(size, generator=generator), "step": step}}}}
    return Checkpoint(step=step, trainables=weights, state=state)


def assert_equal(left: Checkpoint, right: Checkpoint) -> None:
    assert left.step == right.step
    assert left.trainables.keys() == right.trainables.keys()
    assert all(torch.equal(left.trainables[name], right.trainables[name]) for name in right.trainables)
    ours, theirs = (c.state["optimizer"]["state"][0] for c in (left, right))
    assert torch.equal(ours["exp_avg"], theirs["exp_avg"]) and ours["step"] == theirs["step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, checkpoint(7), keep=2)
    assert path == tmp_path / "checkpoint-7"
    assert problem_with(path) is None
    assert_equal(read_checkpoint(path), checkpoint(7))


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, checkpoint(1), keep=1)
    assert names(path) == [
        "manifest.json",
        "trainables.safetensors",
        "trainer_state.json",
        "training_state.safetensors",
    ]
    assert json.loads((path / "trainer_state.json").read_text())["global_step"] == 1
    assert json.loads((path / "manifest.json").read_text())["trainables"]["layer.down"] == {
        "shape": [3, 50],
        "dtype": "torch.float32",
    }


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        write_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-12"]


def test_damaged_newer_checkpoint_does_not_push_good_ones_out(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, checkpoint(step), keep=3)
    (tmp_path / "checkpoint-30" / "manifest.json").unlink()
    write_checkpoint(tmp_path, checkpoint(25), keep=2)
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-25", "checkpoint-30"]


def test_writing_a_good_checkpoint_again_leaves_it_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, checkpoint(5), keep=1)
    before = (path / "manifest.json").stat().st_ino
    write_checkpoint(tmp_path, checkpoint(5), keep=1)
    assert (path / "manifest.json").stat().st_ino == before
    (path / "trainables.safetensors").write_bytes(b"")
    write_checkpoint(tmp_path, checkpoint(5), keep=1)
    assert_equal(read_checkpoint(path), checkpoint(5))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["trainables.safetensors", "training_state.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-4])])
def test_damaged_checkpoint_is_passed_over_with_a_warning_and_refused_by_name(
    tmp_path: Path, file: str, damage
) -> None:
    write_checkpoint(tmp_path, checkpoint(1), keep=3)
    broken = write_checkpoint(tmp_path, checkpoint(2), keep=3)
    damage(broken / file)
    with pytest.warns(UserWarning, match="checkpoint-2 is passed over"):
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    with pytest.raises(TrainingError, match=r"checkpoint-2.*use an earlier checkpoint"):
        read_checkpoint(broken)


@pytest.mark.parametrize(
    "manifest", [None, "", "{", "[]", "{}", '{"format": 99, "files": {}}', '{"format": 1, "files": {}}']
)
def test_checkpoint_with_a_broken_manifest_is_passed_over(tmp_path: Path, manifest: str | None) -> None:
    path = write_checkpoint(tmp_path, checkpoint(1), keep=1)
    if manifest is None:
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text(manifest)
    with pytest.warns(UserWarning, match="checkpoint-1 is passed over"):
        assert latest_checkpoint(tmp_path) is None


def test_folder_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-3.tmp").mkdir()
    (tmp_path / "checkpoint-4").write_text("a file")
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("written_before", [0, 1])
@pytest.mark.parametrize("partial", [False, True])
def test_full_disk_is_a_clear_error_and_leaves_the_previous_checkpoint(
    tmp_path: Path, written_before: int, partial: bool
) -> None:
    write_checkpoint(tmp_path, checkpoint(10), keep=1)
    calls = 0

    def full(tensors: Mapping[str, Tensor], path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > written_before:
            if partial:
                path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write_tensors(tensors, path)

    with pytest.raises(
        TrainingError, match=r"checkpoint-20: cannot be written: .*No space left.*MiB free.*checkpoint-10"
    ) as caught:
        write_checkpoint(tmp_path, checkpoint(20), keep=1, write=full)
    assert "train.resume=true" in str(caught.value)
    assert names(tmp_path) == ["checkpoint-10"]
    assert_equal(read_checkpoint(tmp_path / "checkpoint-10"), checkpoint(10))


def test_refusal_of_the_operating_system_is_a_clear_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, checkpoint(10), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(TrainingError, match=r"checkpoint-20: cannot be written: .*File too large"):
            write_checkpoint(tmp_path, checkpoint(20, size=5000), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["checkpoint-10"]


def test_disk_that_stores_other_bytes_is_noticed_before_the_old_checkpoint_goes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, checkpoint(10), keep=1)

    def lying(tensors: Mapping[str, Tensor], path: Path) -> None:
        write_tensors({name: tensor + 1 for name, tensor in tensors.items()}, path)

    with pytest.raises(TrainingError, match="reads back different from what was written"):
        write_checkpoint(tmp_path, checkpoint(20), keep=1, write=lying)
    assert names(tmp_path) == ["checkpoint-10"]


@pytest.mark.parametrize(
    ("trainables", "message"),
    [
        ({"w": torch.tensor([1.0, float("nan")])}, "w .* holds values that are not finite"),
        ({"w": torch.tensor([float("inf")])}, "w .* holds values that are not finite"),
        ({"w": torch.zeros(0, 8)}, r"w \[0, 8\] is empty"),
        ({}, "no trained parameter to save"),
    ],
)
def test_checkpoint_that_would_be_worthless_is_not_written(
    tmp_path: Path, trainables: dict[str, Tensor], message: str
) -> None:
    write_checkpoint(tmp_path, checkpoint(10), keep=1)
    with pytest.raises(TrainingError, match=message):
        write_checkpoint(tmp_path, Checkpoint(step=20, trainables=trainables, state={}), keep=1)
    assert names(tmp_path) == ["checkpoint-10"]


def test_nan_in_optimizer_state_reads_back_as_itself(tmp_path: Path) -> None:
    state = {"scratch": torch.tensor([float("nan"), 1.0])}
    path = write_checkpoint(tmp_path, Checkpoint(step=1, trainables={"w": torch.ones(1)}, state=state), keep=1)
    assert read_checkpoint(path).state["scratch"].isnan().tolist() == [True, False]


def test_views_shared_storage_and_other_dtypes_are_stored_by_value(tmp_path: Path) -> None:
    storage = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    trainables = {"transposed": storage.T, "row": storage[1], "scalar": torch.tensor(2.0, dtype=torch.float64)}
    path = write_checkpoint(tmp_path, Checkpoint(step=1, trainables=trainables, state={}), keep=1)
    stored = read_checkpoint(path).trainables
    assert all(
        torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype for name, tensor in trainables.items()
    )


KILLED_WRITER = """
import sys, time
from pathlib import Path
import torch
from qaft.train.checkpoint import Checkpoint, write_checkpoint, write_tensors

folder = Path(sys.argv[1])

def slow(tensors, path):
    write_tensors(tensors, path)
    if path.name == sys.argv[2]:
        path.write_bytes(path.read_bytes()[:20])
        (folder / "half-written").touch()
        time.sleep(60)

write_checkpoint(folder, Checkpoint(step=20, trainables={"w": torch.ones(9)}, state={"m": torch.ones(9)}), keep=1, write=slow)
"""


def test_kill_in_the_middle_of_a_write_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, checkpoint(10), keep=1)
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path), "training_state.safetensors"]
    process = subprocess.Popen(command, env=ENVIRONMENT)
    while not (tmp_path / "half-written").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20.tmp", "half-written"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert_equal(read_checkpoint(tmp_path / "checkpoint-10"), checkpoint(10))
    write_checkpoint(tmp_path, checkpoint(20), keep=1)
    assert names(tmp_path) == ["checkpoint-20", "half-written"]
