"""LoRA files: exact factors, loaded by PEFT on the original base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_export import INFO, relative_difference, section, trained
from transformers import AutoModelForCausalLM

from qaft.bases.base import LinearSpec
from qaft.errors import ExportError
from qaft.export import EXPORTERS
from qaft.export.tensors import linear_layers
from qaft.layers.attach import adapted_layers
from qaft.models.load import LoadedModel
from qaft.sections import GridSection, QatSection
from qaft.updates import LowRank

export = EXPORTERS["peft"]
# PEFT 0.21 asks models of transformers 5.23 by their old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def without_quantizer(loaded: LoadedModel) -> LoadedModel:
    """The same rotated model and updates in adapter mode."""
    for layer in adapted_layers(loaded.model).values():
        layer.quantizer = None
    return loaded


def with_peft(base: Path, folder: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).float()
    return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("update", ["lowrank", "linchain", "bank", "rows", "columns", "both"])
def test_base_and_adapter_are_the_run(checkpoint: Any, tmp_path: Path, update: str) -> None:
    loaded = trained(checkpoint(), update, select=lambda n: "layers.1" in n)
    export(loaded, section("peft"), tmp_path / "out", INFO)
    assert relative_difference(loaded.model, with_peft(checkpoint(), tmp_path / "out", torch.bfloat16)) <= 1e-5


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen2", False)])
@pytest.mark.parametrize("update", ["lowrank", "both"])
def test_a_rotated_run_is_turned_back_on_its_factors(
    checkpoint: Any, tmp_path: Path, family: str, tied: bool, update: str
) -> None:
    source = checkpoint(family, tied, torch.float32)
    section_qat = QatSection(weights=GridSection(bits=8, group_size=None))
    loaded = without_quantizer(trained(source, update, qat=section_qat, storage="fp32", dtype="float32"))
    assert loaded.fusion is not None
    export(loaded, section("peft"), tmp_path / "out", INFO)
    assert relative_difference(loaded.model, with_peft(source, tmp_path / "out", torch.float32)) <= 1e-5


@pytest.mark.parametrize("update", ["lowrank", "both"])
def test_the_restored_factors_are_the_inverse_of_the_dense_update(checkpoint: Any, tmp_path: Path, update: str) -> None:
    source = checkpoint("llama", False, torch.float32)
    loaded = trained(
        source, update, qat=QatSection(weights=GridSection(bits=8, group_size=None)), storage="fp32", dtype="float32"
    )
    export(loaded, section("peft"), tmp_path / "out", INFO)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert loaded.fusion is not None
    for name, layer in adapted_layers(loaded.model).items():
        factors = layer.update.low_rank_factors()
        assert factors is not None
        expected = loaded.fusion.inverse(f"{name}.weight", factors.up @ factors.down, loaded.originals)
        key = f"base_model.model.{name}"
        change = stored[f"{key}.lora_B.weight"] @ stored[f"{key}.lora_A.weight"]
        torch.testing.assert_close(change, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_layers_of_different_rank_keep_a_scaling_of_one(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint())
    layer = loaded.model.get_submodule("model.layers.1.mlp.down_proj")
    spec = LinearSpec(name="d", out_features=layer.out_features, in_features=layer.in_features)  # type: ignore[arg-type]
    layer.update = LowRank(spec, rank=7, alpha=21.0)  # type: ignore[assignment]
    torch.nn.init.normal_(layer.update.up, std=0.02)
    export(loaded, section("peft"), tmp_path / "out", INFO)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.1.mlp.down_proj": 7}
    assert relative_difference(loaded.model, with_peft(checkpoint(), tmp_path / "out", torch.bfloat16)) <= 1e-5


def test_only_selected_layers_get_an_adapter(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint(), select=lambda n: n == "model.layers.1.self_attn.v_proj")
    export(loaded, section("peft"), tmp_path / "out", INFO)
    model = with_peft(checkpoint(), tmp_path / "out", torch.bfloat16)
    adapted = [n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert adapted == ["base_model.model.model.layers.1.self_attn.v_proj"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny" and config["peft_type"] == "LORA"
    assert len(linear_layers(loaded.model)) == 14


@pytest.mark.parametrize("rank", [None, 65])
def test_a_dense_update_has_no_lora_file_without_a_rank_to_cut_it_to(
    checkpoint: Any, tmp_path: Path, rank: int | None
) -> None:
    loaded = trained(checkpoint(), "dense", select=lambda n: n.endswith("q_proj"))
    with pytest.raises(ExportError, match=rf"export\.rank names, in \[1, 64\] .*not {rank}; or export `merged`"):
        export(loaded, section("peft", rank=rank), tmp_path / "out", INFO)


def test_a_rank_is_for_updates_that_have_none(checkpoint: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"a rank of its own, which export\.rank=2 would cut"):
        export(trained(checkpoint()), section("peft", rank=2), tmp_path / "out", INFO)
    with pytest.raises(ExportError, match=r"update Sift is not of bounded rank"):
        export(trained(checkpoint(), "sift"), section("peft", rank=2), tmp_path / "out", INFO)


def rotated(source: Path, update: str) -> LoadedModel:
    grid = QatSection(weights=GridSection(bits=8, group_size=None))
    loaded = without_quantizer(trained(source, update, qat=grid, storage="fp32", dtype="float32", select=is_qv))
    assert loaded.fusion is not None
    return loaded


def is_qv(name: str) -> bool:
    return name.endswith(("q_proj", "v_proj"))


@pytest.mark.parametrize("basis", ["original", "fused"])
def test_a_dense_update_of_full_rank_is_the_run(checkpoint: Any, tmp_path: Path, basis: str) -> None:
    source = checkpoint("llama", True, torch.float32)
    plain = {"storage": "fp32", "dtype": "float32", "select": is_qv}
    loaded = rotated(source, "dense") if basis == "fused" else trained(source, "dense", **plain)
    narrowest = min(layer.out_features for layer in adapted_layers(loaded.model).values())
    report = export(loaded, section("peft", rank=narrowest), tmp_path / "out", INFO)
    assert any("cut to this rank: " in note for note in report.notes)
    # q_proj has twice as many rows as v_proj; with all of its singular values in the file it is whole too.
    keep_rank(loaded, narrowest)
    assert relative_difference(loaded.model, with_peft(source, tmp_path / "out", torch.float32)) <= 2e-5


@torch.no_grad()
def keep_rank(loaded: LoadedModel, rank: int) -> None:
    """Cut the run itself, in the original basis, by a second route: the eigenvectors of dW^T dW."""
    for name, layer in adapted_layers(loaded.model).items():
        change = layer.update.delta.double()  # type: ignore[union-attr, operator]
        if loaded.fusion is not None:
            change = loaded.fusion.inverse(f"{name}.weight", change.float(), loaded.originals).double()
        _, vectors = torch.linalg.eigh(change.T @ change)
        cut = change @ vectors[:, -rank:] @ vectors[:, -rank:].T
        if loaded.fusion is not None:
            cut = loaded.fusion.forward(f"{name}.weight", cut.float(), loaded.originals)
        layer.update.delta.copy_(cut)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("rank", [1, 7, 32])
def test_the_kept_energy_is_that_of_the_largest_singular_values(
    checkpoint: Any, tmp_path: Path, rank: int, capsys: Any
) -> None:
    loaded = trained(checkpoint(), "dense", select=is_qv)
    report = export(loaded, section("peft", rank=rank), tmp_path / "out", INFO)
    squares = {
        name: torch.linalg.svdvals(layer.update.delta.detach().double()).square()  # type: ignore[union-attr, operator]
        for name, layer in adapted_layers(loaded.model).items()
    }
    shown = capsys.readouterr().err
    for values in squares.values():
        assert f"{float(values[:rank].sum() / values.sum()):.2%}" in shown
    share = float(sum(v[:rank].sum() for v in squares.values()) / sum(v.sum() for v in squares.values()))
    assert any(f"{share:.2%} of its squared size over all layers" in note for note in report.notes)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, layer in adapted_layers(loaded.model).items():
        key = f"base_model.model.{name}"
        change = (stored[f"{key}.lora_B.weight"] @ stored[f"{key}.lora_A.weight"]).double()
        rest = (change - layer.update.delta.detach().double()).square().sum()  # type: ignore[union-attr, operator]
        assert float(rest) == pytest.approx(float(squares[name][rank:].sum()), rel=1e-4, abs=1e-9)


def test_a_cut_update_is_verified_as_what_the_file_holds_and_its_distance_from_the_run_is_measured(
    checkpoint: Any, tmp_path: Path
) -> None:
    loaded = trained(checkpoint(), "dense", select=is_qv, size=0.3)
    report = export(loaded, section("peft", rank=2, verify=True), tmp_path / "out", INFO)
    assert report.difference is not None and report.difference.max_relative <= 1e-5
    assert report.rounding is not None and report.rounding.kl_mean > 1e-6


def test_a_quantized_run_says_where_the_trained_model_is(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint(), qat=QatSection(weights=GridSection(group_size=32)))
    report = export(loaded, section("peft"), tmp_path / "out", INFO)
    assert any("the trained model is the `merged`" in note for note in report.notes)
    assert "the trained model is the `merged`" in (tmp_path / "out" / "README.md").read_text()
