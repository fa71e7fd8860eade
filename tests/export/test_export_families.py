"""Every family through the loader and the exporters: rotated models load in plain transformers as the same function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import write_checkpoint
from tiny_export import INFO, relative_difference, reloaded, section, trained
from transformers import AutoModelForCausalLM

from qaft.arch import FAMILIES
from qaft.errors import ExportError
from qaft.export import EXPORTERS
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


@pytest.mark.parametrize("name", OPTIONS)
def test_an_adapter_survives_as_lora_unless_it_moves_the_bias_of_a_layer_norm(
    family: Any, tmp_path: Path, name: str
) -> None:
    loaded = trained(family(name), "lowrank", qat=GRID, storage="fp32", dtype="float32")
    if name in ("gpt_neox", "opt", "phi"):
        with pytest.raises(
            ExportError, match="what the bias of a LayerNorm contributes, which changes with the update"
        ):
            EXPORTERS["peft"](loaded, section("peft"), tmp_path / "out", INFO)
        assert list(tmp_path.iterdir()) == []
    else:
        EXPORTERS["peft"](loaded, section("peft"), tmp_path / "out", INFO)
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
