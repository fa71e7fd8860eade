"""Every recipe in configs/ for two steps, as it is but for its model, data, steps and output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_job import DIALOGUES, losses, quiet, write_rows

from qaft.commands.train import train_and_export
from qaft.evaluate.difference import compare_logits, logits_of, prompt_ids
from qaft.layers.activations import plain_activations
from qaft.recipe import load_recipe

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_recipe_trains_and_its_exports_are_the_trained_model(
    config: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", DIALOGUES)
    shipped = load_recipe(config)
    overrides = {
        "model.name": tiny_llama,
        "data.train": data,
        "data.valid": data,
        "train.steps": 2,
        "train.log_every": 1,
        "train.output": tmp_path / "run",
        **{f"export.{i}.verify": "false" for i in range(len(shipped.export))},
    }
    # Paged optimizers need a GPU; they are the same optimizers with their state elsewhere.
    overrides |= {"optim.name": "adamw"} if "paged" in shipped.optim.name else {}
    run = train_and_export(load_recipe(config, [f"{k}={v}" for k, v in overrides.items()]), quiet())
    assert len(losses(run.folder)) == 2
    ids = prompt_ids(run.loaded.tokenizer)
    # Files hold weights: what is done to activations is up to whoever runs them.
    with plain_activations(run.loaded.model):
        trained = logits_of(run.loaded.model, ids)
    for section in shipped.export:
        folder = run.folder / f"export-{section.format}"
        if section.format == "peft":
            assert (folder / "adapter_model.safetensors").is_file()
            continue
        difference = compare_logits(trained, logits_of(folder, ids))
        # Merging an adapter rounds it to bf16 once: a relative error of 2^-9 per weight.
        assert difference.max_relative <= (1e-5 if shipped.qat else 2**-5)
        assert difference.num_tokens > 300
    assert all(bool(torch.isfinite(row).all()) for row in trained.logits)
