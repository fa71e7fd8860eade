"""Rotations that are chosen again while a run is trained: what changes, what must not, and how it continues."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import write_checkpoint
from tiny_job import job, losses, train

from qaft import reselection, training
from qaft.build import Run, build_run, restore_run
from qaft.errors import RecipeError
from qaft.evaluate.difference import compare_logits, logits_of, prompt_ids
from qaft.layers.adapted import AdaptedLinear
from qaft.recipe import parse_recipe
from qaft.reselection import Reselection
from qaft.rotation.choice import Choice
from qaft.rotations import Measured, measure
from qaft.train.checkpoint import latest_checkpoint, read_checkpoint
from qaft.training import prepare_training

QAT = {
    "weights": {"bits": 4, "group_size": 32},
    "activations": {"bits": 4},
    "kv_cache": {"function": "roste", "bits": 4},
    "rotation": "adaptive",
    "target": "simulation",
    "calibration_tokens": 200,
}
START = {"residual": True, "values": [0], "attention": [1], "down": [0, 2]}
OTHER = {"residual": True, "values": [1, 2], "attention": [0, 2], "down": [1]}
SCOPES = {"full": ["all"], "qv": ["q_proj", "v_proj"]}


@pytest.fixture
def raw(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return job(
        tiny_llama,
        tmp_path,
        qat={**QAT, "rotated": START},
        model={"storage": "int4"},
        select={"targets": SCOPES["full"]},
        train={"steps": 6, "save_every": 1, "keep": 9},
    )


def with_every(raw: dict[str, Any], every: int | None, output: str, **train_keys: Any) -> dict[str, Any]:
    folder = str(Path(raw["train"]["output"]).with_name(output))
    return {
        **raw,
        "qat": {**raw["qat"], "reselect_every": every},
        "train": {**raw["train"], "output": folder, **train_keys},
    }


def answer(monkeypatch: Any, *choices: dict[str, Any]) -> None:
    """Let the measurement find these rotations, one after another."""
    found = [Choice.of_layers(3, **choice) for choice in choices]

    def measured(*arguments: Any, **options: Any) -> Measured:
        return replace(measure(*arguments, **options), choice=found.pop(0))

    monkeypatch.setattr(reselection, "measure", measured)


def parameters(run: Run) -> dict[str, torch.Tensor]:
    return {name: layer.update.delta.detach() for name, layer in run.layers.items()}  # type: ignore[union-attr]


def assert_same_parameters(a: Run, b: Run) -> None:
    for name, delta in parameters(a).items():
        assert torch.equal(delta, parameters(b)[name]), name


def in_full_precision(run: Run) -> Run:
    """Take every grid off, so that only the function of the latents is left."""
    for module in run.loaded.model.modules():
        if isinstance(module, AdaptedLinear):
            module.quantizer = None
        for part in ("quantizer", "key", "value"):
            if part in module._modules and not isinstance(module, AdaptedLinear):
                module._modules[part] = None
    return run


def test_an_interval_beyond_the_run_changes_nothing(raw: dict[str, Any]) -> None:
    without = train(with_every(raw, None, "without"))
    beyond = train(with_every(raw, 7, "beyond"))
    assert losses(without.folder) == losses(beyond.folder)
    assert_same_parameters(without, beyond)


def test_choosing_the_same_rotations_again_leaves_the_run_bit_identical(raw: dict[str, Any], monkeypatch: Any) -> None:
    without = train(with_every(raw, None, "without"))
    answer(monkeypatch, START, START)
    again = train(with_every(raw, 2, "again"))
    assert losses(without.folder) == losses(again.folder)
    assert_same_parameters(without, again)
    lines = [json.loads(line) for line in (again.folder / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["rotations/changed"] for line in lines if "rotations/changed" in line}
    assert found == {2: 0, 4: 0}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_a_changed_rotation_keeps_the_function_of_the_latents(tmp_path: Path, family: str, scope: str) -> None:
    targets = [r"query_key_value"] if scope == "qv" and family == "gpt_neox" else SCOPES[scope]
    raw = job(
        write_checkpoint(tmp_path / family, family=family, dtype=torch.float32, num_hidden_layers=3),
        tmp_path,
        qat={**QAT, "rotated": START, "reselect_every": 9},
        # Frozen layers in full precision too: packed ones are rounded in the basis in which they are.
        model={"storage": "fp32", "attention": "eager"},
        select={"targets": targets},
        train={"steps": 2},
    )
    run = train(raw)
    assert len(run.layers) > 0
    parameters_of_model = torch.optim.SGD([*run.loaded.model.parameters()])
    again = Reselection(run.recipe, run.loaded, run.layers, parameters_of_model, run.device)
    ids = prompt_ids(run.loaded.tokenizer)
    in_full_precision(run)
    before = logits_of(run.loaded.model, ids)
    assert again.turn_to(Choice.of_layers(3, **OTHER)) == 3 + 3 + 3
    difference = compare_logits(before, logits_of(run.loaded.model, ids))
    assert 0 < difference.max_relative < 1e-5


def test_turning_there_and_back_restores_parameters_and_moments(raw: dict[str, Any]) -> None:
    run = build_run(parse_recipe(with_every(raw, 2, "run")))
    training = prepare_training(run)
    for layer in run.layers.values():
        torch.nn.init.normal_(layer.update.delta, std=0.01)  # type: ignore[arg-type]
        layer.update.delta.grad = torch.randn_like(layer.update.delta)  # type: ignore[arg-type, union-attr]
    training.optimizer.step()
    again = Reselection(run.recipe, run.loaded, run.layers, training.optimizer, run.device)
    before = {n: d.clone() for n, d in parameters(run).items()}
    moments = {n: training.optimizer.state[layer.update.delta]["exp_avg"].clone() for n, layer in run.layers.items()}
    bases = {n: layer.base.dequantize().clone() for n, layer in run.layers.items()}
    again.turn_to(Choice.of_layers(3, **OTHER))
    down = "model.layers.1.mlp.down_proj"
    assert not torch.allclose(parameters(run)[down], before[down], atol=1e-4)
    again.turn_to(Choice.of_layers(3, **START))
    for name, layer in run.layers.items():
        torch.testing.assert_close(parameters(run)[name], before[name], rtol=1e-5, atol=1e-8)
        state = training.optimizer.state[layer.update.delta]
        torch.testing.assert_close(state["exp_avg"], moments[name], rtol=1e-5, atol=1e-8)
        assert torch.equal(layer.base.dequantize(), bases[name])


@pytest.mark.parametrize("scope", SCOPES)
def test_a_run_with_a_changed_choice_continues_bit_for_bit(raw: dict[str, Any], monkeypatch: Any, scope: str) -> None:
    raw = {**raw, "select": {"targets": SCOPES[scope]}}
    answer(monkeypatch, OTHER, START)
    whole = train(with_every(raw, 2, "whole"))
    for step in (4, 5, 6):
        (whole.folder / f"checkpoint-{step}").rename(whole.folder / f"left-out-{step}")
    answer(monkeypatch, START)
    assert restore_run(whole.folder).recipe.qat.rotated.model_dump(mode="json") == OTHER  # type: ignore[union-attr]
    resumed = train(with_every(raw, 2, "whole", resume=True))
    assert_same_parameters(whole, resumed)
    left = read_checkpoint(whole.folder / "left-out-6")
    found = read_checkpoint(latest_checkpoint(resumed.folder))  # type: ignore[arg-type]
    assert left.state["optimizer"].keys() == found.state["optimizer"].keys()
    assert left.state["recipe"] == found.state["recipe"]
    assert found.state["recipe"]["qat"]["rotated"] == START


def test_the_choice_follows_the_weights_of_the_moment(raw: dict[str, Any], monkeypatch: Any) -> None:
    seen: list[list[float]] = []

    def measured(*arguments: Any, **options: Any) -> Measured:
        found = measure(*arguments, **options)
        first = found.layers[0].linears["model.layers.0.mlp.up_proj"]
        seen.append([errors.delta_w for errors in first.values()])
        return found

    monkeypatch.setattr(reselection, "measure", measured)
    run = train(with_every(raw, 3, "run", steps=7))
    assert len(seen) == 2 and seen[0] != seen[1]
    assert run.recipe.qat.rotated.residual  # type: ignore[union-attr]


def test_the_residual_rotation_cannot_change(raw: dict[str, Any]) -> None:
    run = build_run(parse_recipe(with_every(raw, 2, "run")))
    again = Reselection(run.recipe, run.loaded, run.layers, torch.optim.SGD([torch.zeros(1)]), run.device)
    with pytest.raises(ValueError, match="R1 cannot change during a run"):
        again.turn_to(Choice.of_layers(3, **{**OTHER, "residual": False}))


def test_several_processes_are_refused(raw: dict[str, Any], monkeypatch: Any) -> None:
    run = build_run(parse_recipe(with_every(raw, 2, "run")))
    monkeypatch.setattr(training, "world_size", lambda: 2)
    with pytest.raises(RecipeError, match=r"qat\.reselect_every is for one process, and there are 2"):
        prepare_training(run)
