"""``qaft diff`` of a run and its export: the bound of the format, and whether it holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_checkpoint
from tiny_job import job, train

from qaft.cli import main
from qaft.commands.diff import diff_models
from qaft.errors import DifferenceError, ExportError
from qaft.export.record import read_record
from qaft.export.transform_config import online_rotation
from qaft.recipe import load_recipe

QAT: dict[str, Any] = {
    "weights": {"bits": 4, "group_size": 32},
    "activations": {"bits": 8},
    "kv_cache": {"function": "vllm"},
    "target": "vllm",
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in W4A8 with R4 and vLLM's KV cache, and its export; the export was verified in a fresh process."""
    folder = tmp_path_factory.mktemp("diff")
    run = train(
        job(
            write_checkpoint(folder / "model"),
            folder,
            model={"storage": "int4", "dtype": "bfloat16"},
            select={"kind": "patterns", "targets": ["q_proj", "down_proj"]},
            qat=QAT,
            train={"steps": 2, "batch_size": 4, "output": str(folder / "run")},
            export=[{"format": "compressed-tensors", "profile": "vllm"}],
        )
    )
    assert online_rotation(run.layers["model.layers.0.mlp.down_proj"]) is not None
    return folder / "run"


def test_every_limit_of_the_format_is_printed_and_holds(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diff_models(str(run_folder), str(run_folder / "export-compressed-tensors"), prompts=None, gate=1e-5)
    printed = capsys.readouterr().out
    assert "bound of compressed-tensors: equal weights and codes of inputs" in printed
    for name in (
        "KL in 32 bits",
        "codes of inputs that differ, of a layer: 0.00e+00, allowed 1.00e-02",
        "KL in 16 bits",
    ):
        assert name in printed
    assert printed.count(": holds") == 3 and "EXCEEDED" not in printed


@pytest.fixture
def without_r4(run_folder: Path, tmp_path: Path) -> Path:
    """The export, damaged: its server would not rotate."""
    other = Path(shutil.copytree(run_folder / "export-compressed-tensors", tmp_path / "other"))
    change(other / "config.json", lambda config: config["quantization_config"].pop("transform_config"))
    return other


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def test_a_limit_that_an_export_of_the_run_does_not_keep_fails_without_a_gate(
    run_folder: Path, without_r4: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["diff", str(run_folder), str(without_r4)])
    assert end.value.code == 5
    printed = capsys.readouterr()
    assert printed.out.count("EXCEEDED") >= 2 and "allowed 1.00e-02: EXCEEDED" in printed.out
    assert "above its limits are KL in 32 bits, nats, codes of inputs that differ" in printed.err
    with pytest.raises(DifferenceError, match=r"above its limits are .*; .* the gate is 1e-05"):
        diff_models(str(run_folder), str(without_r4), prompts=None, gate=1e-5)


@pytest.mark.parametrize(
    "edit",
    [
        lambda stamp: stamp["recipe"]["train"].update(seed=7),
        lambda stamp: stamp.update(trained=False),
    ],
)
def test_an_export_of_another_run_or_of_the_base_has_no_limits_to_keep(
    run_folder: Path, without_r4: Path, capsys: pytest.CaptureFixture[str], edit: Callable[[dict[str, Any]], object]
) -> None:
    change(without_r4 / "qaft_export.json", edit)
    diff_models(str(run_folder), str(without_r4), prompts=None, gate=None)
    printed = capsys.readouterr().out
    assert "EXCEEDED" in printed and "the folder is no export of this run, so nothing has to hold" in printed
    with pytest.raises(DifferenceError, match="the gate is 1e-05"):
        diff_models(str(run_folder), str(without_r4), prompts=None, gate=1e-5)


def test_what_a_run_exports_later_or_goes_on_from_does_not_make_it_another_run(run_folder: Path) -> None:
    record = read_record(run_folder / "export-compressed-tensors")
    recipe = load_recipe(run_folder).dump()
    assert record is not None and record.is_of(recipe)
    assert record.is_of({**recipe, "export": [], "train": {**recipe["train"], "resume": True}})
    assert not record.is_of({**recipe, "train": {**recipe["train"], "steps": 3}})


def test_an_export_that_rounds_the_weights_of_the_run_says_so_although_it_was_not_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(
        job(
            write_checkpoint(tmp_path / "model"),
            tmp_path,
            model={"storage": "bf16", "dtype": "bfloat16"},
            update={"kind": "lowrank", "rank": 2},
            optim={"lr": 1e-1},
            train={"steps": 2, "batch_size": 4, "output": str(tmp_path / "run")},
            export=[{"format": "merged", "verify": False}],
        )
    )
    diff_models(str(tmp_path / "run"), str(tmp_path / "run" / "export-merged"), prompts=None, gate=None)
    assert "bound of merged: to the weights as it rounds them" in capsys.readouterr().out


def test_a_damaged_record_is_an_error(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "qaft_export.json").write_text("{}")
    with pytest.raises(ExportError, match=r"qaft_export.json: is no record of this version"):
        diff_models(str(run_folder), str(tmp_path), prompts=None, gate=None)
