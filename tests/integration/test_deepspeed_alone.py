"""DeepSpeed in a single process without MPI, and a process in which it is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launched import LIMIT, ROOT
from tiny_job import job, losses, train, write_job

ABSENT = """
import sys
sys.modules["deepspeed"] = None  # importing it fails, as where it is not installed
from qaft.cli import main

recipe, *asked = sys.argv[1:]
main(["train", recipe, *asked])
"""


def environment() -> dict[str, str]:
    """This process's, without what a launcher would have set."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment(), timeout=LIMIT, check=False
    )


def test_one_process_needs_neither_a_launcher_nor_mpi(tiny_llama: Path, tmp_path: Path) -> None:
    sections = {"train": {"steps": 2}, "export": [{"format": "merged", "verify": False}]}
    recipe = write_job(tmp_path / "job.yaml", job(tiny_llama, tmp_path, **sections))
    result = run(str(ROOT / "launch" / "train.py"), "--local_rank", "0", str(recipe), "--deepspeed", "zero3")
    assert result.returncode == 0, result.stderr
    (tmp_path / "plain").mkdir()
    train(job(tiny_llama, tmp_path / "plain", train={"steps": 2}))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain" / "run"), abs=2e-6)
    assert (tmp_path / "run" / "export-merged" / "model.safetensors").is_file()


def test_without_deepspeed_plain_training_works_and_asking_for_it_names_the_extra(
    tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = write_job(tmp_path / "job.yaml", job(tiny_llama, tmp_path, train={"steps": 1}))
    plain = run("-c", ABSENT, str(recipe))
    assert plain.returncode == 0, plain.stderr
    asked = run("-c", ABSENT, str(recipe), "--deepspeed", "zero2", f"train.output={tmp_path / 'other'}")
    assert asked.returncode == 2
    assert "pip install 'qaft[deepspeed]'" in asked.stderr
    assert "Traceback" not in asked.stderr
