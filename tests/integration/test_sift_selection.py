"""Entries chosen by gradient, from the recipe to the checkpoint and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import job, train

import qaft.choices
from qaft.build import Run, build_run, restore_run
from qaft.errors import RecipeError
from qaft.recipe import parse_recipe


def recipe(checkpoint: Path, folder: Path, **options: Any) -> dict[str, Any]:
    raw = job(checkpoint, folder, update={"kind": "sift", "rate": 0.05, **options}, train={"steps": 2})
    raw["data"]["valid"] = None
    return raw


def places(run: Run) -> dict[str, torch.Tensor]:
    return {name: layer.update.places.clone() for name, layer in run.layers.items()}


@pytest.mark.parametrize("entries", ["entry", "block64"])
def test_the_first_gradients_are_the_largest_of_the_dense_ones(tiny_llama: Path, tmp_path: Path, entries: str) -> None:
    sparse = build_run(parse_recipe(recipe(tiny_llama, tmp_path, entries=entries)))
    dense = build_run(parse_recipe({**recipe(tiny_llama, tmp_path), "update": {"kind": "dense"}}))
    # One batch holds all rows, and the order of rows changes no sum.
    batch = next(qaft.choices._calibration_batches(dense.recipe, dense.loaded, 1))
    qaft.choices._loss_on(dense.recipe, dense.loaded)(batch).backward()
    choice = next(iter(sparse.layers.values())).update.entry_choice(rate=0.05, entries=entries)
    for name, layer in dense.layers.items():
        gradient = layer.update.delta.grad
        chosen = set(places(sparse)[name].tolist())
        expected = set(choice.largest(gradient).tolist())
        assert len(chosen & expected) >= 0.98 * len(expected)


def test_a_run_is_restored_with_its_entries_and_without_its_data(tiny_llama: Path, tmp_path: Path) -> None:
    run = train(recipe(tiny_llama, tmp_path))
    (tmp_path / "rows.jsonl").unlink()
    restored = restore_run(run.folder)
    assert all(torch.equal(left, places(restored)[name]) for name, left in places(run).items())
    assert all(torch.equal(m.weight(), restored.layers[n].weight()) for n, m in run.layers.items())
    assert all(bool(layer.update.values.any()) for layer in run.layers.values())


def test_magnitude_needs_no_pass_over_the_data(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pass(*_: object) -> None:
        raise AssertionError("the weights are all that is looked at")

    monkeypatch.setattr(qaft.choices, "largest_gradients", no_pass)
    run = build_run(parse_recipe(recipe(tiny_llama, tmp_path, choose="magnitude")))
    for layer in run.layers.values():
        magnitude = layer.base.dequantize().abs().flatten()
        chosen = magnitude[layer.update.places]
        assert int((magnitude > chosen.min()).sum()) < len(chosen)


def test_a_rate_out_of_range_is_refused_with_its_key(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"update: .*rate=2 must be above 0"):
        build_run(parse_recipe(recipe(tiny_llama, tmp_path, rate=2)))
