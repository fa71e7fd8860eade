"""The picture and the table of a run's log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_job import job, losses, quiet, train
from typer.testing import CliRunner

from qaft.cli import app
from qaft.commands.report import PICTURE, place_of, read_history, report_run
from qaft.commands.report_plot import figure_of
from qaft.errors import RecipeError

LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj", "model.layers.2.self_attn.v_proj")
RECORDS: list[dict[str, Any]] = [
    {"step": 1, "loss": 3.0},
    {"step": 1, "quantization/delta_g": 0.2, f"quantization/delta_g/{LAYERS[0]}": 0.1},
    {"step": 2, "loss": 2.0},
    {"step": 2, f"quantization/delta_g/{LAYERS[1]}": 0.3, f"quantization/delta_g/{LAYERS[2]}": None},
    {"step": 2, "rotations/changed": 0.0},
    {"step": 3, "loss": 1.5, f"quantization/flip_rate/{LAYERS[2]}": 0.01},
    {"step": 3, "rotations/changed": 2.0},
    {"step": 3, "eval_loss": 1.75, f"quantization/delta_g/{LAYERS[0]}": 0.05},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [json.dumps(record) for record in RECORDS]
    # As a killed run leaves it.
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "los', encoding="utf-8")
    return tmp_path


def test_a_log_becomes_series_of_losses_and_layers(run: Path) -> None:
    history = read_history(run)
    assert history.losses == [(1, 3.0), (2, 2.0), (3, 1.5)]
    assert history.eval_losses == [(3, 1.75)]
    assert history.quantities == {
        "delta_g": {LAYERS[0]: [(1, 0.1), (3, 0.05)], LAYERS[1]: [(2, 0.3)]},
        "flip_rate": {LAYERS[2]: [(3, 0.01)]},
    }
    assert history.turned == [3]


def test_the_picture_shows_every_layer_as_it_was_last_and_greys_what_was_not_measured(run: Path) -> None:
    figure = figure_of(read_history(run), title="run")
    shown, *rest = [
        np.ma.filled(axis.images[0].get_array(), np.nan)
        for axis in figure.axes
        if axis.get_yticks().size and len(axis.images)
    ]
    nan = np.nan
    np.testing.assert_equal(shown, [[0.05, nan, 0.3], [nan, nan, nan]])
    np.testing.assert_equal(rest, [[[nan, nan, nan], [nan, nan, 0.01]]])


def test_the_picture_shows_losses_and_the_mean_of_each_kind(run: Path) -> None:
    top, course, *_ = figure_of(read_history(run), title="run").axes
    loss, evaluation, turned = top.get_lines()
    assert loss.get_xydata().tolist() == [[1, 3], [2, 2], [3, 1.5]]
    assert evaluation.get_xydata().tolist() == [[3, 1.75]]
    assert list(turned.get_xdata()) == [3, 3]
    up = course.get_lines()[0]
    assert up.get_xydata().tolist() == [[1, 0.1], [2, 0.3], [3, 0.05]]


def test_a_run_is_reported_by_the_command(tiny_llama: Path, tmp_path: Path) -> None:
    qat = {"weights": {"bits": 4, "group_size": 32}, "activations": {"bits": 8}}
    folder = train(job(tiny_llama, tmp_path, qat=qat, model={"storage": "int4"})).folder
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert f"loss {losses(folder)[0]:.4f} at step 1" in result.output
    assert "delta_g" in result.output and "clip_fraction" in result.output


def test_a_run_without_a_grid_has_its_losses_alone(tiny_llama: Path, tmp_path: Path) -> None:
    folder = train(job(tiny_llama, tmp_path)).folder
    assert report_run(folder, quiet(), out=tmp_path / "a.png") == tmp_path / "a.png"
    assert len(figure_of(read_history(folder), title="run").axes) == 1


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no run folder"), ("", "no loss in it yet"), ('{"step": 1}', "no loss in it yet")]
)
def test_what_is_no_run_is_refused_and_nothing_is_written(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        report_run(tmp_path, quiet())
    assert not (tmp_path / PICTURE).exists()


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        ("model.layers.13.mlp.up_proj", ("up_proj", 13)),
        ("gpt_neox.layers.0.attention.query_key_value", ("query_key_value", 0)),
        ("lm_head", ("lm_head", 0)),
    ],
)
def test_a_layers_place_is_read_from_its_name(layer: str, place: tuple[str, int]) -> None:
    assert place_of(layer) == place
