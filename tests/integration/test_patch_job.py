"""Patches from the command line: a base that two runs share, and the model of each in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_job import job, train, write_job

from qaft.cli import main
from qaft.export.record import read_record

GRIDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int4": ("int4", "compressed-tensors", {"bits": 4, "group_size": 32}),
    "W8A8": ("int8_group", "compressed-tensors", {"bits": 8, "group_size": None}),
    "nf4": ("nf4", "bnb", {"kind": "nf4"}),
    "fp4": ("fp4", "bnb", {"kind": "fp4"}),
}


def rows_job(checkpoint: Path, folder: Path, name: str, grid: str = "int4", **optim: Any) -> dict[str, Any]:
    storage, packed, weights = GRIDS[grid]
    exports = [{"format": format, "verify": format == "patch"} for format in ("patch", packed)]
    return job(
        checkpoint,
        folder,
        model={"storage": storage},
        qat={"weights": weights, **({"activations": {"bits": 8}} if grid == "W8A8" else {})},
        update={"kind": "roco", "rows": 4},
        select={"targets": ["q_proj", "v_proj"]},
        optim={"lr": 1e-1, **optim},
        train={"output": str(folder / name)},
        export=exports,
    )


def qaft(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return int(exit.value.code or 0)


LONG = ("W8A8", "fp4")
"""Grids whose patches are compared byte for byte in export/test_patch.py, and here only where there is time."""


@pytest.mark.parametrize("grid", [pytest.param(g, marks=[pytest.mark.long] * (g in LONG)) for g in GRIDS])
def test_one_base_serves_two_runs_in_turn(tiny_llama: Path, tmp_path: Path, grid: str, capsys: Any) -> None:
    runs = [train(rows_job(tiny_llama, tmp_path, name, grid, lr=lr)) for name, lr in (("a", 1e-1), ("b", 2e-1))]
    write_job(tmp_path / "a.yaml", {**rows_job(tiny_llama, tmp_path, "a", grid), "export": []})
    base = tmp_path / "base"
    assert qaft("patch", "base", tmp_path / "a.yaml", "--out", base) == 0
    original = (base / "model.safetensors").read_bytes()
    untrained = read_record(base)
    assert untrained is not None and not any(untrained.is_of(run.recipe.dump()) for run in runs)
    seen = [load_file(base / "model.safetensors")]
    for run in runs:
        assert qaft("patch", "apply", run.folder / "export-patch", "--base", base) == 0
        stored = load_file(base / "model.safetensors")
        full = load_file(run.folder / f"export-{GRIDS[grid][1]}" / "model.safetensors")
        assert stored.keys() == full.keys() and all(torch.equal(t, full[n]) for n, t in stored.items())
        assert not any(all(torch.equal(t, other[n]) for n, t in stored.items()) for other in seen)
        seen.append(stored)
        record = read_record(base)
        assert record is not None and record.is_of(run.recipe.dump())
        if len(seen) == 2:
            assert qaft("export", "--check-only", base) == 0
            assert "and patched (export-patch)" in capsys.readouterr().out
        assert qaft("patch", "revert", run.folder / "export-patch", "--base", base) == 0
        assert (base / "model.safetensors").read_bytes() == original


def test_a_packed_base_needs_a_grid(tiny_llama: Path, tmp_path: Path, capsys: Any) -> None:
    raw = {**rows_job(tiny_llama, tmp_path, "a"), "qat": None, "export": []}
    assert qaft("patch", "base", write_job(tmp_path / "a.yaml", raw), "--out", tmp_path / "base") == 2
    assert "a packed base holds layers on int or nf4 or fp4 grids" in capsys.readouterr().err
