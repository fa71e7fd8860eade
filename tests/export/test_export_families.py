"""Every family through the loader and the exporters: rotated models load in plain transformers as the same function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_checkpoint import write_checkpoint
from tiny_export import INFO, relative_difference, reloaded, section, trained
from transformers import AutoModelForCausalLM

from qaft.arch import FAMILIES
from qaft.export import EXPORTERS
from qaft.layers.attach import adapted_layers
from qaft.models.load import load_model
from qaft.sections import GridSection, ModelSection, QatSection

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "gpt_neox": {"num_key_value_heads": 4},
    "opt": {"num_key_value_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {},
    "phi3": SPECIAL,
}
GRID = QatSection(weights=GridSection(bits=4, group_size=32))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    written: dict[tuple[str, bool], Path] = {}

    def make(name: str, tied: bool = False) -> Path:
        if (name, tied) not in written:
            folder = tmp_path_factory.mktemp(name)
            written[name, tied] = write_checkpoint(folder, family=name, tied=tied, dtype=torch.float32, **OPTIONS[name])
        return written[name, tied]

    return make


def test_every_family_without_a_test_of_its_own_is_here() -> None:
    llama_like, post_norms = {"llama", "mistral", "qwen2", "qwen3"}, {"gemma2", "gemma3_text"}
    assert set(OPTIONS) | llama_like | post_norms == set(FAMILIES)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_streamed_and_rotated_model_is_the_original_function(family: Any, name: str, tied: bool) -> None:
    folder = family(name, tied)
    loaded = load_model(ModelSection(name=str(folder), storage="fp32", dtype="float32"), qat=GRID)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert relative_difference(plain, loaded.model) <= 2e-5


@pytest.mark.parametrize("format", ["merged", "compressed-tensors"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_fused_export_reloads_in_plain_transformers(family: Any, tmp_path: Path, name: str, format: str) -> None:
    loaded = trained(family(name, True), "both", qat=GRID)
    EXPORTERS[format](loaded, section(format), tmp_path / "out", INFO)
    assert relative_difference(loaded.model, reloaded(tmp_path / "out")) <= 1e-5


@pytest.mark.parametrize("storage", ["fp32", "int4"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_original_basis_in_fp32_is_the_same_function(family: Any, tmp_path: Path, name: str, storage: str) -> None:
    attention = "query_key_value", "qkv_proj", "v_proj", "dense", "out_proj"
    loaded = trained(
        family(name, True),
        "both",
        qat=GRID,
        storage=storage,
        dtype="float32",
        select=lambda n: n.endswith(attention),
    )
    EXPORTERS["merged"](loaded, section("merged", basis="original"), tmp_path / "out", INFO)
    assert relative_difference(loaded.model, reloaded(tmp_path / "out")) <= 2e-5


@pytest.mark.parametrize("update", ["lowrank", "both"])
@pytest.mark.parametrize("name", OPTIONS)
# PEFT 0.21 asks models of transformers 5.23 by their old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_rotated_run_is_its_base_and_an_adapter_with_the_bias_that_a_layer_norm_needs(
    family: Any, tmp_path: Path, name: str, update: str
) -> None:
    loaded = trained(family(name), update, qat=GRID, storage="fp32", dtype="float32")
    for layer in adapted_layers(loaded.model).values():
        layer.quantizer = None
    EXPORTERS["peft"](loaded, section("peft"), tmp_path / "out", INFO)
    layer_norm = name in ("gpt_neox", "opt", "phi")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_bias"] is layer_norm
    base = AutoModelForCausalLM.from_pretrained(family(name), dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert relative_difference(loaded.model, adapted) <= 2e-5
