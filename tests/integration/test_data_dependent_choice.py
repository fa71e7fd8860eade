"""Rows and columns that were chosen from data are those of the checkpoint, whatever has become of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import ROWS, job, train, write_rows
from torch import Tensor

import qaft.choices
from qaft.build import Run, restore_run
from qaft.errors import IncompatibleError, TargetError
from qaft.train.checkpoint import checkpoint_path, read_checkpoint, write_checkpoint

BOTH = {"kind": "roco", "rows": 3, "columns": 2}
SCORED = ("max", "min", "mixed")


def recipe(checkpoint: Path, folder: Path, choose: str = "max", **sections: Any) -> dict[str, Any]:
    raw = job(checkpoint, folder, update={**BOTH, "choose": choose}, optim={"lr": 1e-2}, **sections)
    raw["data"]["valid"] = None
    return raw


def chosen(run: Run) -> dict[str, Tensor]:
    return {
        f"{n}.{axis}": getattr(m.update, axis).clone() for n, m in run.layers.items() for axis in ("rows", "columns")
    }


def weights(run: Run) -> dict[str, Tensor]:
    return {name: layer.weight().detach().clone() for name, layer in run.layers.items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("choose", SCORED)
def test_a_run_is_restored_without_its_training_data(tiny_llama: Path, tmp_path: Path, choose: str) -> None:
    run = train(recipe(tiny_llama, tmp_path, choose, train={"steps": 2}))
    (tmp_path / "rows.jsonl").unlink()
    restored = restore_run(run.folder)
    assert_equal(chosen(restored), chosen(run))
    assert_equal(weights(restored), weights(run))


def test_the_choice_depends_on_the_data(tiny_llama: Path, tmp_path: Path) -> None:
    # Without this the tests of this file could not fail.
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    write_rows(second / "rows.jsonl", [{"prompt": "0123456789 " * 4, "completion": "9876543210"}])
    runs = [train(recipe(tiny_llama, folder, train={"steps": 1})) for folder in (first, second)]
    left, right = map(chosen, runs)
    assert any(not torch.equal(left[name], right[name]) for name in left)


class Interrupted(Exception):
    pass


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, checkpoint: Any, **options: Any) -> Path:
        path = write_checkpoint(folder, checkpoint, **options)
        if checkpoint.step == step:
            raise Interrupted
        return path

    monkeypatch.setattr("qaft.train.resume.write_checkpoint", write)


def test_two_steps_and_two_after_a_resume_equal_four_bit_for_bit(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe(tiny_llama, tmp_path, train={"steps": 4, "save_every": 2, "output": str(tmp_path / "whole")})
    parts = {**whole, "train": {**whole["train"], "output": str(tmp_path / "parts"), "resume": True}}
    expected = train(whole)
    with monkeypatch.context() as patched:
        interrupt_after(2, patched)
        with pytest.raises(Interrupted):
            train(parts)
    monkeypatch.setattr(qaft.choices, "capture_scores", _no_calibration)
    resumed = train(parts)
    assert_equal(chosen(resumed), chosen(expected))
    assert_equal(weights(resumed), weights(expected))
    stored = [read_checkpoint(checkpoint_path(tmp_path / name, 4)) for name in ("parts", "whole")]
    assert_equal(dict(stored[0].trainables), dict(stored[1].trainables))


def _no_calibration(*_: object) -> None:
    raise AssertionError("a checkpoint holds the choice: nothing is left to calibrate")


def test_a_resume_on_changed_data_keeps_the_rows_that_were_trained(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = recipe(tiny_llama, tmp_path, train={"steps": 3, "save_every": 1, "resume": True})
    with monkeypatch.context() as patched:
        interrupt_after(1, patched)
        with pytest.raises(Interrupted):
            train(raw)
    before = read_checkpoint(checkpoint_path(tmp_path / "run", 1)).trainables
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "0123456789 " * 4, "completion": "9876543210"}] * len(ROWS))
    indices = {f"{n.removesuffix('.rows')}.update.rows": i for n, i in chosen(train(raw)).items() if n.endswith("rows")}
    assert indices
    assert all(torch.equal(before[name], rows) for name, rows in indices.items())


def test_a_checkpoint_without_the_choice_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    run = train(recipe(tiny_llama, tmp_path, train={"steps": 1}))
    stored = read_checkpoint(checkpoint_path(run.folder, 1))
    parameters = {name: tensor for name, tensor in stored.trainables.items() if tensor.is_floating_point()}
    checkpoint_path(run.folder, 1).joinpath("manifest.json").unlink()
    write_checkpoint(run.folder, type(stored)(step=1, trainables=parameters, state=stored.state), keep=1)
    with pytest.raises(
        TargetError, match=r"names differ, first 'model\.layers\.0\.self_attn\.q_proj\.update\.columns'"
    ):
        restore_run(run.folder)
    raw = recipe(tiny_llama, tmp_path, train={"steps": 1, "resume": True})
    with pytest.raises(IncompatibleError, match=r"update\.columns is not in the checkpoint"):
        train(raw)
