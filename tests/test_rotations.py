"""From a recipe to the rotations in use: what is measured, what is kept with a run, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import write_checkpoint
from tiny_job import job, losses, quiet, train
from transformers import AutoModelForCausalLM

from qaft import rotations
from qaft.build import restore_run
from qaft.commands.rotate import PICTURE, REPORT, measure_recipe
from qaft.errors import ModelError, QaftError, RecipeError
from qaft.evaluate.difference import compare_logits, logits_of, prompt_ids
from qaft.models.source import source_of
from qaft.recipe import parse_recipe

QAT = {
    "weights": {"bits": 4, "group_size": 32},
    "activations": {"bits": 4},
    "kv_cache": {"function": "roste", "bits": 4},
    "rotation": "adaptive",
    "target": "simulation",
    "calibration_tokens": 200,
}
HALF = {"train": {"steps": 4, "save_every": 2}}


@pytest.fixture
def raw(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return job(
        tiny_llama, tmp_path, qat=QAT, model={"storage": "int4"}, select={"targets": ["q_proj", "v_proj"]}, **HALF
    )


def test_a_run_with_measured_rotations_is_restored_with_them(raw: dict[str, Any], monkeypatch: Any) -> None:
    run = train(raw)
    rotated = run.recipe.qat.rotated  # type: ignore[union-attr]
    assert rotated is not None and any((rotated.values, rotated.attention, rotated.down))
    assert run.loaded.fusion is not None and run.loaded.fusion.choice.layers() == json.loads(rotated.model_dump_json())
    monkeypatch.setattr(rotations, "measure", _must_not_be_called)
    again = restore_run(run.folder)
    ids = prompt_ids(run.loaded.tokenizer)
    trained, restored = logits_of(run.loaded.model, ids), logits_of(again.loaded.model, ids)
    assert compare_logits(trained, restored).max_relative == 0


def test_a_continued_run_keeps_its_rotations(raw: dict[str, Any], monkeypatch: Any) -> None:
    run = train({**raw, "train": {**raw["train"], "steps": 4}})
    monkeypatch.setattr(rotations, "measure", _must_not_be_called)
    more = train({**raw, "train": {**raw["train"], "steps": 4, "resume": True}})
    assert more.recipe.qat == run.recipe.qat
    assert len(losses(more.folder)) == 4


def _must_not_be_called(*_: Any) -> None:
    raise AssertionError("the rotations were measured again")


@pytest.mark.parametrize(
    ("target", "online"), [("portable", ([], [])), ("vllm", ([], [0, 1, 2])), ("simulation", ([0, 1, 2], [0, 1, 2]))]
)
def test_hadamard_means_every_rotation_that_the_target_runs(
    tiny_llama: Path, tmp_path: Path, target: str, online: tuple[list[int], list[int]]
) -> None:
    recipe = parse_recipe(job(tiny_llama, tmp_path, qat={**QAT, "rotation": "hadamard", "target": target}))
    source = source_of(recipe.model)
    found = rotations.with_rotations(recipe, source, frozenset(), torch.device("cpu"))
    assert found.qat is not None and found.qat.rotated is not None
    assert found.qat.rotated.residual and found.qat.rotated.values == (0, 1, 2)
    assert ([*found.qat.rotated.attention], [*found.qat.rotated.down]) == online


def test_adaptive_leaves_out_what_the_family_excludes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "gemma2", family="gemma2", dtype=torch.float32, head_dim=16)
    raw = job(folder, tmp_path, qat={**QAT, "kv_cache": None}, model={"attention": "eager"})
    raw["train"]["steps"] = 1
    run = train(raw)
    assert run.recipe.qat is not None and run.recipe.qat.rotated is not None
    assert not run.recipe.qat.rotated.residual
    with pytest.raises(ModelError, match="gemma2: the residual stream cannot be rotated"):
        train({**raw, "qat": {**raw["qat"], "rotation": "hadamard"}})


def test_rotations_by_hand_are_taken_as_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    raw = job(tiny_llama, tmp_path, qat={**QAT, "rotated": {"residual": False, "down": [1]}})
    raw["train"]["steps"] = 1
    run = train(raw)
    assert run.loaded.fusion is not None
    assert set(run.loaded.fusion.places) == {f"model.layers.1.mlp.{part}_proj" for part in ("up", "down")}


def test_rotate_writes_the_table_the_numbers_and_the_picture(raw: dict[str, Any], tmp_path: Path) -> None:
    console = quiet()
    measured = measure_recipe(parse_recipe(raw), console, out=tmp_path / "out")
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["chosen"] == measured.choice.layers()
    errors = report["total_error"]
    assert errors["chosen"] <= min(errors["none"], errors["all"])
    assert len(report["layers"]) == 3
    query = report["layers"][1]["linears"]["model.layers.1.self_attn.q_proj"]
    assert set(query) == {"I,I", "H,I"} and query["I,I"]["delta_y"] > 0
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "R4 down" in text and "R1 stream" in text and "summed error" in text
    png = (tmp_path / "out" / PICTURE).read_bytes()
    assert png.startswith(b"\x89PNG") and (tmp_path / "out" / PICTURE).with_suffix(".svg").is_file()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qat": None}, RecipeError, "has no qat section"),
        ({"data": {"train": None}}, RecipeError, r"data\.train is required"),
        ({"data": {"train": "missing.jsonl"}}, QaftError, r"missing\.jsonl"),
    ],
)
def test_without_what_it_needs_nothing_is_written(
    raw: dict[str, Any], tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    for section, values in changes.items():
        raw[section] = None if values is None else {**raw[section], **values}
    with pytest.raises(error, match=message):
        measure_recipe(parse_recipe(raw), quiet(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_width_without_a_rotation_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "odd", dtype=torch.float32, hidden_size=60, intermediate_size=90, head_dim=14)
    assert AutoModelForCausalLM.from_pretrained(folder).config.head_dim == 14
    raw = job(folder, tmp_path, qat={**QAT, "weights": {"bits": 4, "group_size": None}})
    with pytest.raises(ModelError, match="rotation over 14 elements: there is no Hadamard matrix of this width"):
        measure_recipe(parse_recipe(raw), quiet(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_calibration_set_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    raw["data"]["train"] = str(tmp_path / "empty.jsonl")
    with pytest.raises(QaftError, match=r"empty\.jsonl"):
        measure_recipe(parse_recipe(raw), quiet(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
