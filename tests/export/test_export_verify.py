"""The fresh process: it accepts the trained model and nothing else, and needs no qaft to load it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_export import INFO, prompts, section, trained

from qaft.errors import DifferenceError, ExportError
from qaft.evaluate.difference import PromptLogits, compare_logits
from qaft.evaluate.float32 import float_logits
from qaft.export import EXPORTERS, reload, verify
from qaft.export.base import EXACT, Written
from qaft.export.dense import _write
from qaft.export.publish import publish
from qaft.export.tensors import linear_layers, merged_weight
from qaft.export.verify import Reloaded, exported_weights, reload_logits
from qaft.sections import GridSection, QatSection

QAT = QatSection(weights=GridSection(bits=4, group_size=32))


def test_a_packed_export_is_verified_against_the_live_forward(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint(tied=True), qat=QAT, storage="int4", select=lambda n: "q_proj" in n)
    before = float_logits(loaded.model, prompts())
    report = EXPORTERS["compressed-tensors"](loaded, section("compressed-tensors", verify=True), tmp_path / "out", INFO)
    assert report.difference is not None and report.difference.max_relative <= 1e-5
    assert report.rounding is None
    assert "reloaded by plain transformers" in (tmp_path / "out" / "README.md").read_text()
    assert all(torch.equal(a, b) for a, b in zip(before, float_logits(loaded.model, prompts()), strict=True))


def test_a_merged_adapter_is_verified_and_its_rounding_reported(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint("qwen2", True))
    report = EXPORTERS["merged"](loaded, section("merged", verify=True), tmp_path / "out", INFO)
    assert report.difference is not None and report.difference.max_relative <= 1e-5
    assert report.rounding is not None and 1e-5 < report.rounding.max_relative < 0.1
    assert 0 < report.rounding.kl_mean < 1e-2


def test_an_adapter_is_verified_on_its_base(checkpoint: Any, tmp_path: Path) -> None:
    report = EXPORTERS["peft"](trained(checkpoint(), "both"), section("peft", verify=True), tmp_path / "out", INFO)
    assert report.difference is not None and report.difference.max_relative <= 1e-5


def test_an_export_that_is_not_the_trained_model_never_appears(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reload_here(folder: Path, ids: tuple[torch.Tensor, ...], **_: Any) -> Reloaded:
        return Reloaded(ids, float_logits(reload.load(str(folder), "cpu", None, None), ids))

    monkeypatch.setattr(verify, "reload_logits", reload_here)
    loaded = trained(checkpoint(), qat=QAT)
    chosen = section("merged", verify=True)

    def flipped(folder: Path) -> Written:
        written = _write(loaded, chosen, folder)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 0.05
        save_file(tensors, path, metadata={"format": "pt"})
        return written

    with pytest.raises(DifferenceError, match=r"max_relative=.*allowed 1e-05"):
        publish(loaded, chosen, tmp_path / "out", INFO, write=flipped)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_lacks_a_tensor_is_an_error_with_its_name(checkpoint: Any, tmp_path: Path) -> None:
    EXPORTERS["merged"](trained(checkpoint()), section("merged"), tmp_path / "out", INFO)
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"missing_keys.*layers\.0\.mlp\.up_proj\.weight"):
        reload_logits(tmp_path / "out", prompts())


def test_the_fresh_process_imports_nothing_of_qaft_before_it_has_loaded() -> None:
    tree = ast.parse(Path(reload.__file__).read_text())
    main = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
    loading = next(i for i, n in enumerate(main.body) if "load(folder" in ast.unparse(n))
    before = [*(n for n in tree.body if n is not main), *main.body[: loading + 1]]
    imported = [
        ast.unparse(n) for part in before for n in ast.walk(part) if isinstance(n, (ast.Import, ast.ImportFrom))
    ]
    assert any(line.startswith("from transformers import") and "AutoModelForCausalLM" in line for line in imported)
    assert not [line for line in imported if "qaft" in line]


def test_exported_weights_are_in_place_only_within_their_block(checkpoint: Any) -> None:
    loaded = trained(checkpoint())
    layers, ids = linear_layers(loaded.model), tuple(prompts())
    live = float_logits(loaded.model, ids)

    def weight_of(name: str, layer: Any) -> torch.Tensor:
        return merged_weight(layer, torch.bfloat16)

    with exported_weights(loaded.model, weight_of, torch.bfloat16):
        rounded = float_logits(loaded.model, ids)
    assert compare_logits(PromptLogits(ids, live), PromptLogits(ids, rounded)).max_relative > 1e-5
    assert linear_layers(loaded.model) == layers
    assert all(torch.equal(a, b) for a, b in zip(live, float_logits(loaded.model, ids), strict=True))


def test_a_difference_that_is_not_a_number_exceeds_every_bound() -> None:
    ids = (torch.tensor([1, 2, 3]),)
    a = PromptLogits(ids, (torch.randn(3, 5),))
    b = PromptLogits(ids, (torch.full((3, 5), float("nan")),))
    with pytest.raises(DifferenceError):
        EXACT.check(compare_logits(a, b))
