"""A regularizer with a memory in the job of the command line: its run continues bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import COLORS, job, write_rows

from qaft.build import build_run
from qaft.errors import RecipeError
from qaft.recipe import parse_recipe
from qaft.train.checkpoint import read_checkpoint
from qaft.train.loop import fit
from qaft.train.resume import start_state
from qaft.training import prepare_training

CLASSES = {"prompt": "Box {i} is", "verbalizers": {"0": " red", "1": " blue"}}


def raw(checkpoint: Path, folder: Path, **train: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    file = write_rows(folder.parent / "classes.jsonl", [{"i": i, "label": i % 2} for i in range(len(COLORS))])
    data = {"train": str(file), "valid": None, "format": "classification", "classification": CLASSES}
    terms = [{"kind": "pace", "weight": 1e-2, "variant": "fast"}]
    sections = {"update": {"kind": "lowrank", "rank": 4}, "regularize": terms, "data": data}
    # Half of the rows in a step: from the third step on every sample has been seen.
    return job(checkpoint, folder, **sections, train={"steps": 6, "batch_size": 4, **train})


def parameters(checkpoint: Path, folder: Path, **train: Any) -> dict[str, torch.Tensor]:
    training = prepare_training(build_run(parse_recipe(raw(checkpoint, folder, **train))))
    fit(training, start_state(training))
    return {name: parameter.detach() for name, parameter in training.params.items()}


def test_a_resumed_run_remembers_the_samples_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    whole = parameters(tiny_llama, tmp_path / "whole", save_every=3, keep=9)
    middle = tmp_path / "whole" / "run" / "checkpoint-3"
    assert len(read_checkpoint(middle).state["terms"][0]["samples"]) == len(COLORS)
    shutil.copytree(middle, tmp_path / "parts" / "run" / middle.name)
    resumed = parameters(tiny_llama, tmp_path / "parts", resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_several_processes_are_refused(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qaft.training.world_size", lambda: 2)
    with pytest.raises(RecipeError, match="its last pass, which another of the 2 processes may have made"):
        prepare_training(build_run(parse_recipe(raw(tiny_llama, tmp_path))))
