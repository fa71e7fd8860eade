"""The extragradient in the job of the command line: it learns, continues bit for bit, and says where it cannot run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import job, losses

from qaft.build import build_run
from qaft.errors import RecipeError
from qaft.recipe import parse_recipe
from qaft.train.engine import AccelerateEngine
from qaft.train.loop import fit
from qaft.train.resume import start_state
from qaft.train.run import TrainRun
from qaft.training import prepare_training


def prepared(checkpoint: Path, folder: Path, **train: Any) -> TrainRun:
    folder.mkdir(parents=True, exist_ok=True)
    sections = {
        "update": {"kind": "lowrank", "rank": 4},
        "gradient": {"kind": "extragradient", "rate": 0.05},
        "data": {"train": str(folder.parent / "rows.jsonl"), "valid": None},
    }
    job(checkpoint, folder.parent)
    return prepare_training(build_run(parse_recipe(job(checkpoint, folder, **sections, train={"steps": 6, **train}))))


def trained(checkpoint: Path, folder: Path, **train: Any) -> dict[str, torch.Tensor]:
    training = prepared(checkpoint, folder, **train)
    fit(training, start_state(training))
    return {name: parameter.detach() for name, parameter in training.params.items()}


def test_a_resumed_run_equals_the_whole_one_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    whole = trained(tiny_llama, tmp_path / "whole", save_every=3, keep=9)
    middle = tmp_path / "whole" / "run" / "checkpoint-3"
    shutil.copytree(middle, tmp_path / "parts" / "run" / middle.name)
    resumed = trained(tiny_llama, tmp_path / "parts", resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    found = losses(tmp_path / "whole" / "run")
    assert found[-1] < found[0]


def test_several_processes_are_refused(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AccelerateEngine, "world_size", property(lambda _: 2))
    with pytest.raises(RecipeError, match="extragradient: its second gradient is that of one process, and there are 2"):
        prepared(tiny_llama, tmp_path / "two")
