"""``qaft diff`` of a run and its export: the bound of the format, and whether it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_checkpoint
from tiny_job import job, train

from qaft.commands.diff import diff_models
from qaft.errors import DifferenceError, ExportError
from qaft.export.transform_config import online_rotation

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


def test_a_limit_that_is_not_kept_is_named(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    export = run_folder / "export-compressed-tensors"
    for path in export.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    del config["quantization_config"]["transform_config"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(DifferenceError, match="the gate is 1e-05"):
        diff_models(str(run_folder), str(other), prompts=None, gate=1e-5)
    printed = capsys.readouterr().out
    assert printed.count("EXCEEDED") >= 2 and "allowed 1.00e-02: EXCEEDED" in printed


def test_a_damaged_record_is_an_error(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "qaft_export.json").write_text("{}")
    with pytest.raises(ExportError, match=r"qaft_export.json: is no record of this version"):
        diff_models(str(run_folder), str(tmp_path), prompts=None, gate=None)
