"""``qaft merge-adapter``: what is printed is what the export keeps, and the offered run saves what it would lose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from tiny_adapter import TARGETS, save_adapter
from tiny_checkpoint import write_checkpoint
from tiny_job import job, losses, quiet, train

from qaft.build import Run, build_run
from qaft.cli import main
from qaft.commands.merge_adapter import Merge, merge_adapter
from qaft.data.load import load_samples
from qaft.errors import ExportError, ModelError, RecipeError
from qaft.evaluate.perplexity import samples_perplexity
from qaft.recipe import apply_overrides, load_recipe, parse_recipe
from qaft.sections import DataSection

# PEFT 0.21 asks models of transformers 5.23 by their old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SMALL, LARGE = 0.004, 0.5
"""Sizes of B with which an update is far below a step of the grid, and far above."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"))


def asked(base: Path, adapter: Path, **options: Any) -> Merge:
    return Merge(**{"adapter": adapter, "base": str(base), "group_size": 32, **options})


@pytest.mark.parametrize(
    ("storage", "group_size"), [("int4", 32), ("int4", -1), ("int8_group", 32), ("nf4", None), ("fp4", None)]
)
def test_large_updates_survive_and_small_ones_do_not(tmp_path: Path, storage: str, group_size: int | None) -> None:
    base = write_checkpoint(tmp_path / "base", intermediate_size=128)
    grid = {"storage": storage, "group_size": group_size}
    small = merge_adapter(asked(base, save_adapter(base, tmp_path / "s", size=SMALL / 16), **grid), quiet())
    large = merge_adapter(asked(base, save_adapter(base, tmp_path / "l", size=LARGE), **grid), quiet())
    assert {row.name.rpartition(".")[2] for row in small} == set(TARGETS)
    assert all(row.share is not None and row.share < 0.3 for row in small)
    assert all(row.share is not None and row.share > 0.9 for row in large)
    # Only what is lost is worth a run.
    assert (tmp_path / "s-qat.yaml").exists()
    assert not (tmp_path / "l-qat.yaml").exists()


def test_the_share_is_that_of_the_weights_in_the_export(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", dtype=torch.float32)
    adapter = save_adapter(base, tmp_path / "lora", target_modules=["q_proj"], size=0.015)
    rows = merge_adapter(asked(base, adapter, out=tmp_path / "out", force=True, dtype="float32"), quiet())
    factors = load_file(adapter / "adapter_model.safetensors")
    originals, served = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for row in rows:
        prefix = f"base_model.model.{row.name}"
        update = 2 * factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]
        change = unpacked(served, row.name) - nearest_int4(originals[f"{row.name}.weight"].float())
        share = float((change * update).sum() / update.square().sum())
        assert row.share == pytest.approx(share, abs=1e-4)
        assert 0.1 < share < 0.9


def unpacked(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The weight of a layer of a file in int4 with groups of 32, [O, I], by the format's own library."""
    shape = tensors[f"{name}.weight_shape"]
    codes = unpack_from_int32(tensors[f"{name}.weight_packed"], 4, torch.Size(shape.tolist())).float()
    return codes * tensors[f"{name}.weight_scale"].float().repeat_interleave(32, dim=1)


def nearest_int4(weight: torch.Tensor) -> torch.Tensor:
    """The symmetric grid -7 .. 7 by the largest weight of each 32."""
    groups = weight.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / scale).round() * scale).flatten(-2)


def test_a_lost_update_is_refused_without_force_and_the_recipe_is_there(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "lora", size=SMALL)
    with pytest.raises(ExportError, match=r"6 of 6 requantized layers would lose more than 30% of their update"):
        merge_adapter(asked(base, adapter, out=tmp_path / "out", data="rows.jsonl"), quiet())
    assert not (tmp_path / "out").exists()
    recipe = load_recipe(tmp_path / "out-qat.yaml")
    assert recipe.model.adapter == str(adapter)
    assert recipe.update.options == {"rank": 4, "alpha": 8.0}
    assert recipe.select.options["targets"] == sorted(TARGETS)
    assert recipe.data.train == "rows.jsonl"
    assert recipe.qat is not None
    assert (recipe.qat.weights.bits, recipe.qat.weights.group_size, recipe.qat.rotation) == (4, 32, "hadamard")
    assert recipe.export[0].format == "compressed-tensors"


@pytest.mark.parametrize(
    ("storage", "group_size", "grid", "format"),
    [
        ("nf4", None, ("nf4", 4, 64), "bnb"),
        ("fp4", None, ("fp4", 4, 64), "bnb"),
        ("int8_group", -1, ("int", 8, -1), "compressed-tensors"),
        ("int4", None, ("int", 4, 128), "compressed-tensors"),
    ],
)
def test_the_recipe_trains_through_the_grid_that_was_asked_for(
    tmp_path: Path, storage: str, group_size: int | None, grid: tuple[Any, ...], format: str
) -> None:
    base = write_checkpoint(tmp_path / "base", hidden_size=128, intermediate_size=128)
    adapter = save_adapter(base, tmp_path / "lora", size=SMALL)
    file = tmp_path / "rescue.yaml"
    merge_adapter(asked(base, adapter, storage=storage, group_size=group_size, recipe=file), quiet())
    recipe = load_recipe(file)
    assert recipe.qat is not None
    weights = recipe.qat.weights
    assert (weights.kind, weights.bits, weights.group_size) == grid
    assert (recipe.model.storage, recipe.export[0].format) == (storage, format)


def test_mixed_ranks_and_scalings_are_one_update(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "lora", size=SMALL, rank_pattern={"v_proj": 2, r"0\.mlp\.down_proj": 6})
    merge_adapter(asked(base, adapter), quiet())
    # Scalings: 8 / 4 twice of q and once of down, 8 / 2 twice of v, 8 / 6 once of down.
    assert load_recipe(tmp_path / "lora-qat.yaml").update.options == {"rank": 6, "alpha": 12.0}


def test_layers_of_some_blocks_are_selected_by_their_full_names(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "lora", size=SMALL, layers_to_transform=[1])
    rows = merge_adapter(asked(base, adapter), quiet())
    assert len(rows) == 3
    targets = load_recipe(tmp_path / "lora-qat.yaml").select.options["targets"]
    assert targets == [f"^{row.name.replace('.', chr(92) + '.')}$" for row in sorted(rows, key=lambda row: row.name)]


def test_a_model_that_cannot_be_rotated_with_its_adapter_is_trained_unrotated(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", family="gpt_neox")
    adapter = save_adapter(base, tmp_path / "lora", size=SMALL, target_modules=["query_key_value"])
    merge_adapter(asked(base, adapter), quiet())
    assert yaml.safe_load((tmp_path / "lora-qat.yaml").read_text())["qat"]["rotation"] == "none"


def test_the_offered_run_saves_what_requantization_loses(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", dtype=torch.float32)
    lora = {"update": {"kind": "lowrank", "rank": 8, "alpha": 8}, "select": {"targets": ["all"]}}
    in_16_bits = job(base, tmp_path, **lora, optim={"lr": 1e-3}, train={"steps": 60})
    in_16_bits["export"] = [{"format": "peft", "verify": False}]
    trained = train(in_16_bits)
    adapter, data = tmp_path / "run" / "export-peft", in_16_bits["data"]
    plan = asked(base, adapter, group_size=-1, dtype="float32", data=data["train"])
    rows = merge_adapter(plan, quiet())
    assert any(row.share is not None and row.share < 0.7 for row in rows)
    rescue = yaml.safe_load((adapter.parent / "export-peft-qat.yaml").read_text())
    sections = {"optim": in_16_bits["optim"], "data": data, "export": []}
    rescued = train({**rescue, **sections, "train": {**rescue["train"], "steps": 20}})
    forced = build_run(parse_recipe({key: rescue[key] for key in ("model", "select", "update")}))
    for layer in forced.layers.values():
        # The packed base, merged with the adapter and put onto its grid again.
        layer.quantizer = forced.loaded.frozen_quantizer
    before, lost, saved = (mean_loss(run, trained.recipe.data) for run in (trained, forced, rescued))
    assert lost > before + 0.1
    assert saved < before
    # It begins near the adapter and not at the base model.
    assert losses(rescued.folder)[0] < 0.6 * losses(trained.folder)[0]


def mean_loss(run: Run, section: DataSection) -> float:
    """Nats per target on the validation rows."""
    samples = load_samples(section, run.loaded.tokenizer, "valid").samples
    found = samples_perplexity(run.loaded.model.eval(), samples, max_length=section.max_length)
    return found.nll / found.tokens


def test_without_data_the_recipe_says_what_is_missing(base: Path, tmp_path: Path, capsys: Any) -> None:
    adapter = save_adapter(base, tmp_path / "lora", size=SMALL)
    with pytest.raises(SystemExit) as end:
        main(["merge-adapter", str(adapter), "--base", str(base), "--group-size", "32"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    file = tmp_path / "lora-qat.yaml"
    assert f"qaft train {file} data.train=FILE" in printed
    assert "6 of 6 layers keep less than 70% of their update in int4" in printed
    with pytest.raises(RecipeError, match=r"data\.train is required for training"):
        train(apply_overrides(yaml.safe_load(file.read_text()), [f"train.output={tmp_path / 'run'}"]))


def test_as_json_it_prints_nothing_else(base: Path, tmp_path: Path, capsys: Any) -> None:
    adapter = save_adapter(base, tmp_path / "lora", size=SMALL)
    with pytest.raises(SystemExit):
        main(["merge-adapter", str(adapter), "--base", str(base), "--group-size", "32", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["trained_on"] == str(base)
    assert len(printed["layers"]) == 6
    assert set(printed["layers"][0]) == {"name", "share", "error"}


def test_another_recipe_is_not_overwritten_without_force(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "lora", size=SMALL)
    merge_adapter(asked(base, adapter), quiet())
    merge_adapter(asked(base, adapter), quiet())
    with pytest.raises(RecipeError, match=r"lora-qat\.yaml: exists already.*--recipe, or --force"):
        merge_adapter(asked(base, adapter, data="rows.jsonl"), quiet())
    merge_adapter(asked(base, adapter, data="rows.jsonl", force=True), quiet())
    assert load_recipe(tmp_path / "lora-qat.yaml").data.train == "rows.jsonl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "int8"}, "must be one of int4, int8_group, nf4, fp4"),
        ({"storage": "nf4"}, "--group-size 32: nf4 has blocks of its own size"),
        ({"dtype": "float64"}, "model.dtype"),
    ],
)
def test_impossible_options_are_refused(base: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    adapter = save_adapter(base, tmp_path / "lora")
    with pytest.raises(RecipeError, match=message):
        merge_adapter(asked(base, adapter, **options), quiet())


@pytest.mark.parametrize("storage", ["nf4", "fp4"])
def test_rows_that_blocks_of_a_code_book_do_not_fill_are_refused(base: Path, tmp_path: Path, storage: str) -> None:
    adapter = save_adapter(base, tmp_path / "lora")
    message = rf"--storage {storage}: \S*down_proj has rows of 96 weights, which blocks of 64 do not fill"
    with pytest.raises(RecipeError, match=message):
        merge_adapter(asked(base, adapter, storage=storage, group_size=None), quiet())


def test_a_taken_folder_is_refused_before_anything_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qaft.commands.merge_adapter.build_run", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ExportError, match="exists already"):
        merge_adapter(asked(base, save_adapter(base, tmp_path / "lora"), out=tmp_path / "out"), quiet())


def test_the_adapter_of_another_model_is_named(base: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", family="gpt_neox")
    adapter = save_adapter(other, tmp_path / "lora", target_modules=["query_key_value"])
    with pytest.raises(ModelError, match=rf"is no linear layer of the blocks of this base; the adapter is for {other}"):
        merge_adapter(asked(base, adapter), quiet())
