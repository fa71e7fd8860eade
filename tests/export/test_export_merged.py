"""Merged checkpoints: the trained weights bit for bit, or the same function in the original basis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_export import INFO, relative_difference, reloaded, section, trained

from qaft.errors import ExportError
from qaft.evaluate.difference import PromptLogits, compare_logits, logits_of, prompt_ids
from qaft.evaluate.float32 import float_logits
from qaft.export import EXPORTERS
from qaft.export.base import FLOOR_16BIT
from qaft.export.tensors import linear_layers
from qaft.layers.adapted import AdaptedLinear
from qaft.sections import GridSection, QatSection

merged = EXPORTERS["merged"]
GRIDS: dict[str, GridSection | None] = {
    "adapter": None,
    "int4-sym-g32": GridSection(bits=4, group_size=32),
    "int4-asym-channel": GridSection(bits=4, group_size=None, symmetric=False),
    "int3-sym-channel": GridSection(bits=3, group_size=None),
    "nf4": GridSection(kind="nf4", group_size=32),
    "fp4": GridSection(kind="fp4", group_size=32),
    "q4_0": GridSection.model_validate({"kind": "q4_0"}),
    "mxfp4": GridSection.model_validate({"kind": "mxfp4"}),
    "nvfp4": GridSection.model_validate({"kind": "nvfp4"}),
    "int4-rms-channel": GridSection(bits=4, group_size=None, range="rms"),
}


def qat(grid: GridSection | None, rotation: str = "hadamard") -> QatSection | None:
    return None if grid is None else QatSection(weights=grid, rotation=rotation)


def tensors(folder: Path) -> dict[str, Any]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("update", ["dense", "lowrank", "both"])
def test_merged_weights_are_those_of_the_forward_bit_for_bit(
    checkpoint: Any, tmp_path: Path, update: str, grid: Any
) -> None:
    loaded = trained(checkpoint(), update, qat=qat(grid))
    merged(loaded, section("merged"), tmp_path / "out", INFO)
    found = tensors(tmp_path / "out")
    for name, layer in linear_layers(loaded.model).items():
        assert torch.equal(found[f"{name}.weight"], layer.weight().detach()), name
    assert found["model.norm.weight"].eq(1).all() == (grid is not None)


@pytest.mark.parametrize("storage", ["bf16", "int4", "nf4"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_frozen_layers_are_written_as_they_dequantize(checkpoint: Any, tmp_path: Path, storage: str) -> None:
    grid = GridSection(bits=4, group_size=32)
    loaded = trained(checkpoint(), qat=qat(grid), storage=storage, select=lambda n: n.endswith("q_proj"))
    merged(loaded, section("merged"), tmp_path / "out", INFO)
    found = tensors(tmp_path / "out")
    frozen = [n for n, m in linear_layers(loaded.model).items() if not isinstance(m, AdaptedLinear)]
    assert len(frozen) == 12
    for name in frozen:
        assert torch.equal(found[f"{name}.weight"], loaded.model.get_submodule(name).dequantize())  # type: ignore[operator]
    assert relative_difference(loaded.model, reloaded(tmp_path / "out")) <= 1e-5


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True)])
@pytest.mark.parametrize("rotation", ["hadamard", "none"])
def test_a_fused_export_reloads_as_the_trained_function(
    checkpoint: Any, tmp_path: Path, family: str, tied: bool, rotation: str
) -> None:
    loaded = trained(checkpoint(family, tied), qat=qat(GridSection(bits=4, group_size=32), rotation))
    merged(loaded, section("merged", max_shard_gb=1e-5), tmp_path / "out", INFO)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (tied and rotation == "none")
    assert ("lm_head.weight" in tensors(tmp_path / "out")) is not config["tie_word_embeddings"]
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert relative_difference(loaded.model, reloaded(tmp_path / "out")) <= 1e-5


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen2", False)])
def test_the_original_basis_in_fp32_is_the_same_function(
    checkpoint: Any, tmp_path: Path, family: str, tied: bool
) -> None:
    source = checkpoint(family, tied, torch.float32)
    loaded = trained(source, "both", qat=qat(GridSection(bits=8, group_size=None)), storage="fp32", dtype="float32")
    merged(loaded, section("merged", basis="original"), tmp_path / "out", INFO)
    assert relative_difference(loaded.model, reloaded(tmp_path / "out")) <= 1e-5


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False)])
def test_the_original_basis_copies_what_was_not_trained(
    checkpoint: Any, tmp_path: Path, family: str, tied: bool
) -> None:
    source = checkpoint(family, tied)
    chosen = {"model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"}
    loaded = trained(source, qat=qat(GridSection(bits=4, group_size=32)), select=chosen.__contains__)
    merged(loaded, section("merged", basis="original"), tmp_path / "out", INFO)
    found, original = tensors(tmp_path / "out"), tensors(source)
    assert found.keys() == original.keys()
    changed = {name for name, tensor in original.items() if not torch.equal(found[name], tensor)}
    assert changed == {f"{name}.weight" for name in chosen}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied


def test_the_original_basis_in_16_bits_stays_at_the_rounding_floor(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint(tied=True), qat=qat(GridSection(bits=4, group_size=32)))
    merged(loaded, section("merged", basis="original"), tmp_path / "out", INFO)
    ids = (torch.arange(40),)
    live, again = float_logits(loaded.model, ids), float_logits(reloaded(tmp_path / "out"), ids)
    assert compare_logits(PromptLogits(ids, live), PromptLogits(ids, again)).kl_mean <= 1e-3


def test_the_original_basis_of_a_real_model_stays_at_the_rounding_floor(stories260k: Path, tmp_path: Path) -> None:
    loaded = trained(stories260k, qat=qat(GridSection(bits=4, group_size=None)), select=lambda n: n.endswith("q_proj"))
    merged(loaded, section("merged", basis="original"), tmp_path / "out", INFO)
    ids = prompt_ids(loaded.tokenizer)
    live, again = logits_of(loaded.model, ids), logits_of(tmp_path / "out", ids)
    FLOOR_16BIT.check(compare_logits(live, again))


def test_an_adapter_merged_in_fp32_is_not_rounded(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint())
    merged(loaded, section("merged", dtype="float32"), tmp_path / "fp32", INFO)
    merged(loaded, section("merged"), tmp_path / "bf16", INFO)
    assert relative_difference(loaded.model, reloaded(tmp_path / "fp32")) <= 1e-5
    assert relative_difference(loaded.model, reloaded(tmp_path / "bf16")) > 1e-4


def test_values_outside_of_float16_are_refused(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint())
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[3, 5] = 1e6
    with pytest.raises(ExportError, match=r"model\.embed_tokens\.weight: values exceed the range of torch\.float16"):
        merged(loaded, section("merged", dtype="float16"), tmp_path / "out", INFO)
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_run_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint(), "dense")
    with torch.no_grad():
        loaded.model.get_submodule("model.layers.1.mlp.up_proj").update.delta[0, 0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj\.weight: holds values that are not finite"):
        merged(loaded, section("merged"), tmp_path / "out", INFO)
    assert list(tmp_path.iterdir()) == []


def test_an_online_rotation_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint())
    loaded.model.get_submodule("model.layers.0.mlp.down_proj").rotation = torch.nn.Flatten(-1)  # type: ignore[assignment]
    with pytest.raises(ExportError, match="online rotation"):
        merged(loaded, section("merged"), tmp_path / "out", INFO)


def test_an_export_describes_itself(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint(), qat=qat(GridSection(bits=4, group_size=32)))
    report = merged(loaded, section("merged"), tmp_path / "out", INFO)
    stamp = json.loads((tmp_path / "out" / "qaft_export.json").read_text())
    assert stamp["recipe"] == INFO.recipe and len(stamp["recipe_sha256"]) == 64
    assert (stamp["format"], stamp["dtype"], stamp["basis"]) == ("merged", "bfloat16", "fused")
    assert stamp["verified"] is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/tiny\n")
    assert "loss: 1.5" in card and "qaft export runs/x" in card and "not verified" in card
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= set(report.files)
    assert report.sizes["model.safetensors"] == (tmp_path / "out" / "model.safetensors").stat().st_size
