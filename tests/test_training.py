"""From a built run to what training takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_job import job

from qaft.build import build_run
from qaft.recipe import parse_recipe
from qaft.train.loop import fit
from qaft.train.resume import start_state
from qaft.training import prepare_training


def test_layers_that_the_model_does_not_use_are_named_and_stay_as_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    run = build_run(parse_recipe(job(tiny_llama, tmp_path, train={"steps": 1})))
    # Its forward pass takes that many blocks.
    run.loaded.model.config.num_hidden_layers = 2
    with pytest.warns(
        UserWarning, match=r"went through model\.layers\.2\.self_attn\.q_proj, model\.layers\.2\.\S+v_proj;"
    ):
        training = prepare_training(run)
    fit(training, start_state(training))
    moved = {name for name, layer in run.layers.items() if bool(layer.update.delta.any())}
    assert moved == {name for name in run.layers if ".2." not in name}
