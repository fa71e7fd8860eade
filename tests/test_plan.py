"""Planned sizes are those of the model that is built, and the table of engines follows from them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_checkpoint import write_checkpoint
from tiny_job import job

from qaft.build import build_run
from qaft.commands.plan import print_plan
from qaft.plan import ENGINES, ModelSize, footprint, model_size, optimizer_state_bytes
from qaft.recipe import Recipe, parse_recipe

QAT = {"weights": {"group_size": 32}}
CASES: dict[str, dict[str, Any]] = {
    "nf4": {"model": {"storage": "nf4", "double_quant": True}, "update": {"kind": "lowrank", "rank": 3}},
    "int4 qat": {"model": {"storage": "int4"}, "qat": QAT},
    "int8 fused": {"model": {"storage": "int8"}, "qat": {**QAT, "rotation": "none"}},
    "rows": {"model": {"storage": "int4", "group_size": 32}, "update": {"kind": "roco", "rows": 2, "columns": 1}},
    "shared rotations": {"update": {"kind": "gsoft", "block": 8}, "select": {"targets": ["all"]}},
    "a shared rotation of some": {"update": {"kind": "gsoft", "block": 8}},
    "tied scalings": {"update": {"kind": "ssb", "tie": True}, "select": {"targets": ["all"]}},
    "bf16": {"model": {"storage": "bf16", "dtype": "bfloat16"}, "train": {"param_dtype": "bfloat16"}},
}


def recipe(checkpoint: Path, folder: Path, case: str) -> Recipe:
    sections = {"model": {"dtype": "float32"}, "select": {"targets": ["q_proj", "v_proj"]}, **CASES[case]}
    return parse_recipe(job(checkpoint, folder, **sections))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_planned_bytes_are_those_of_the_built_model(tmp_path: Path, case: str, tied: bool, family: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", family=family, tied=tied)
    planned = model_size(recipe(checkpoint, tmp_path, case))
    run = build_run(recipe(checkpoint, tmp_path, case))
    tensors = [*run.loaded.model.parameters(), *run.loaded.model.buffers()]
    trained = [p for p in run.loaded.model.parameters() if p.requires_grad]
    assert planned.num_trained == sum(p.numel() for p in trained)
    assert planned.trained == sum(p.nbytes for p in trained)
    assert planned.frozen + planned.trained == sum(tensor.nbytes for tensor in tensors)


def test_no_weight_is_needed(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model")
    (checkpoint / "model.safetensors").unlink()
    assert model_size(recipe(checkpoint, tmp_path, "nf4")).frozen > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_partitions_nothing_and_many_leave_the_base_whole(engine: str) -> None:
    size = ModelSize(frozen=1000, num_trained=160, trained=640)
    one, many = (footprint(size, engine, state=8, world_size=world) for world in (1, 64))
    assert one.frozen == many.frozen == 1000
    totals = [held.parameters + held.gradients + held.optimizer + held.host for held in (one, many)]
    assert totals[1] <= totals[0]
    # At the least: parameters, gradients and two moments.
    assert totals[0] >= 4 * 640
    assert (totals[1] < 640) == engine.startswith("zero3")


@pytest.mark.parametrize(
    ("optim", "engine", "expected"),
    [
        ({"name": "adamw"}, "zero3", 8),
        ({"name": "adamw_8bit"}, "none", 2),
        ({"name": "adamw_8bit"}, "zero2", 8),
        ({"name": "sgd"}, "zero1", 0),
        ({"name": "sgd", "momentum": 0.9}, "zero1", 4),
    ],
)
def test_optimizer_state_per_scalar(optim: dict[str, Any], engine: str, expected: int) -> None:
    assert optimizer_state_bytes(parse_recipe({"model": {"name": "m"}, "optim": optim}), engine) == expected


def test_the_table_has_a_row_for_each_engine_and_marks_the_recipes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", dtype=torch.float32)
    asked = recipe(checkpoint, tmp_path, "nf4")
    asked = asked.model_copy(update={"train": asked.train.model_copy(update={"deepspeed": "zero2"})})
    console = Console(file=io.StringIO(), width=120)
    print_plan(asked, world_size=4, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "4 processes, KiB on each" in text
    assert [engine for engine in ENGINES if f" {engine} " in text] == list(ENGINES)
    assert "zero2 *" in text
    assert "none *" not in text
