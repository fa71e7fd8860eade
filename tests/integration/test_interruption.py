"""A run that is killed, or that meets a full disk, loses nothing that it had saved."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import job, write_job

import qaft.train.checkpoint as checkpoint_module
from qaft.cli import main
from qaft.train.checkpoint import latest_checkpoint, problem_with, read_checkpoint

STEPS, SAVE_EVERY = 40, 3


def recipe(checkpoint: Path, folder: Path, **train: Any) -> Path:
    folder.mkdir()
    raw = job(
        checkpoint,
        folder,
        qat={"weights": {"bits": 4, "group_size": 32}},
        data={"valid": None, "packing": True},
        optim={"lr": 1e-3, "schedule": "cosine"},
        train={"steps": STEPS, "batch_size": 1, "save_every": SAVE_EVERY, **train},
    )
    # Equal recipes, or the checkpoint would be refused: the data lies in one place.
    rows = folder.parent / "rows.jsonl"
    if not rows.exists():
        rows.write_bytes((folder / "rows.jsonl").read_bytes())
    raw["data"]["train"] = str(rows)
    return write_job(folder / "recipe.yaml", raw)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, f"ended with {process.returncode} before it wrote {path.name}"
        time.sleep(0.005)


def test_a_run_that_was_terminated_continues_to_the_same_bits(tiny_llama: Path, tmp_path: Path) -> None:
    whole, cut = recipe(tiny_llama, tmp_path / "whole"), recipe(tiny_llama, tmp_path / "cut")
    # Sums are formed in the same order only with the same number of threads.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "qaft", "train", str(cut)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        wait_for(cut.parent / "run" / f"checkpoint-{SAVE_EVERY}", run)
        run.send_signal(signal.SIGTERM)
        output, _ = run.communicate(timeout=120)
    assert run.returncode == 143, output
    assert "SIGTERM: saved" in output
    saved = latest_checkpoint(cut.parent / "run")
    assert saved is not None
    assert SAVE_EVERY <= read_checkpoint(saved).step < STEPS
    main_ok(["train", str(cut), "train.resume=true"])
    main_ok(["train", str(whole)])
    resumed, direct = (read_checkpoint(r.parent / "run" / f"checkpoint-{STEPS}").trainables for r in (cut, whole))
    assert resumed.keys() == direct.keys()
    assert all(torch.equal(resumed[name], direct[name]) for name in direct)


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code


def test_a_full_disk_ends_the_run_with_one_message_and_keeps_the_last_checkpoint(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tiny_llama, tmp_path / "full", steps=9, save_every=3)
    write, run = checkpoint_module.save_tensors, path.parent / "run"

    def save_tensors(tensors: Any, file: Path) -> None:
        if (run / "checkpoint-3").exists():
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        write(tensors, file)

    monkeypatch.setattr(checkpoint_module, "save_tensors", save_tensors)
    with pytest.raises(SystemExit) as end:
        main(["train", str(path)])
    captured = capsys.readouterr()
    assert end.value.code == 1
    (message,) = [line for line in captured.err.splitlines() if "Error" in line]
    assert "No space left on device" in message
    assert f"Last good checkpoint: {run / 'checkpoint-3'}" in message
    assert "Traceback" not in captured.err
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-3"]
    assert problem_with(run / "checkpoint-3") is None


def test_a_full_disk_while_exporting_leaves_the_run_and_no_half_export(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tiny_llama, tmp_path / "full", steps=1, save_every=1)
    main_ok(["train", str(path)])
    run = path.parent / "run"

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("qaft.export.checkpoint_writer.save_tensors", full)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["export", str(run), "--format", "merged"])
    assert end.value.code == 1
    assert "the disk is full" in capsys.readouterr().err
    assert not list(run.glob("export-*"))
    assert problem_with(run / "checkpoint-1") is None
