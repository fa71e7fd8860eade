"""Every file that is written has the mode that the process's umask asks for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_job import job, train

from qaft.tensor_file import save_tensors


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("replaces", [False, True])
def test_a_tensor_file_has_the_mode_of_a_plain_file(
    mask: int, replaces: bool, umask: Callable[[int], int], tmp_path: Path
) -> None:
    umask(mask)
    (tmp_path / "plain").write_text("")
    path = tmp_path / "x.safetensors"
    for value in (0.0, 1.0) if replaces else (1.0,):
        save_tensors({"x": torch.full((3,), value)}, path, metadata={"format": "pt"})
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert torch.equal(load_file(path)["x"], torch.ones(3))


def test_checkpoints_and_exports_can_be_read_by_whom_the_umask_allows(
    umask: Callable[[int], int], tiny_llama: Path, tmp_path: Path
) -> None:
    umask(0o027)
    formats = [{"format": name, "verify": False} for name in ("merged", "peft")]
    run = train(job(tiny_llama, tmp_path, update={"kind": "lowrank", "rank": 2}, train={"steps": 1}, export=formats))
    modes = {str(p.relative_to(run.folder)): p.stat().st_mode & 0o777 for p in run.folder.rglob("*") if p.is_file()}
    assert {"checkpoint-1/trainables.safetensors", "export-peft/adapter_model.safetensors"} <= modes.keys()
    assert set(modes.values()) == {0o640}, modes
