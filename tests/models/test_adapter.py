"""PEFT folders read without PEFT: the same updates, and a clear refusal of what is more than that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapter import peft_model, save_adapter
from tiny_checkpoint import write_checkpoint

from qaft.errors import ModelError
from qaft.models.adapter import CONFIG, WEIGHTS, open_adapter

# PEFT 0.21 asks models of transformers 5.23 by their old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 3, "down_proj": 5},
    },
    "rslora-patterns": {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), dtype=torch.float32)


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return save_adapter(base, tmp_path / "lora")


def edit(folder: Path, **settings: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **settings}), encoding="utf-8")


@pytest.mark.parametrize("options", SCALINGS.values(), ids=SCALINGS.keys())
def test_every_update_is_the_one_that_peft_would_merge(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = peft_model(base, **options)
    model.save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path)
    modules = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    modules = {n: m for n, m in modules.items() if hasattr(m, "get_delta_weight")}
    assert set(adapter.layers) == set(modules)
    for name, module in modules.items():
        factors = adapter.factors(name)
        torch.testing.assert_close(factors.up @ factors.down, module.get_delta_weight("default"), rtol=1e-5, atol=1e-7)


def test_it_names_the_model_that_it_was_trained_on(folder: Path, base: Path) -> None:
    assert open_adapter(folder).base == str(base)


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "other method": ({"peft_type": "IA3"}, ["peft_type='IA3'", "only LORA", "merge_and_unload"]),
    "dora": ({"use_dora": True}, ["use_dora=True", "merge_and_unload"]),
    "trained modules": ({"modules_to_save": ["lm_head"]}, ["modules_to_save=['lm_head']", "merge_and_unload"]),
    "trained biases": ({"bias": "lora_only"}, ["bias='lora_only'", "merge_and_unload"]),
    "biases of B": ({"lora_bias": True}, ["lora_bias=True"]),
    "trained tokens": ({"trainable_token_indices": [3]}, ["trainable_token_indices=[3]"]),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 2]]}, ["layer_replication"]),
    "a setting of the future": ({"use_magic": 0.5}, ["use_magic=0.5", "more than a plain LoRA"]),
    "a changed base": (
        {"init_lora_weights": "pissa_niter_4"},
        ["init_lora_weights='pissa_niter_4'", "path_initial_model_for_weight_conversion"],
    ),
    "another rank": ({"r": 8}, ["has factors of rank 4", "rank 8"]),
    "no alpha": ({"lora_alpha": None}, ["alpha None"]),
}


@pytest.mark.parametrize(("settings", "fragments"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_more_than_a_plain_lora_is_refused(
    folder: Path, settings: Mapping[str, Any], fragments: list[str]
) -> None:
    edit(folder, **settings)
    with pytest.raises(ModelError) as error:
        open_adapter(folder)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva", False])
def test_starts_that_leave_the_base_alone_are_read(folder: Path, init: Any) -> None:
    edit(folder, init_lora_weights=init, lora_dropout=0.1)
    assert len(open_adapter(folder).layers) == 6


def test_factors_of_an_embedding_are_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ModelError, match=r"lora_embedding_A .* is no factor of a linear layer.*merge_and_unload"):
        open_adapter(tmp_path)


def test_a_missing_factor_is_named(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"of model\.layers\.0\.mlp\.down_proj do not fit"):
        open_adapter(folder)


@pytest.mark.parametrize(("file", "text"), [(CONFIG, "save_pretrained"), (WEIGHTS, "adapter_model.bin is not read")])
def test_missing_files_are_named(folder: Path, file: str, text: str) -> None:
    (folder / file).unlink()
    with pytest.raises(ModelError, match=rf"no {file}.*{text}"):
        open_adapter(folder)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_broken_files_are_named(folder: Path, file: str) -> None:
    (folder / file).write_text("{")
    with pytest.raises(ModelError, match=rf"{file}: cannot be read"):
        open_adapter(folder)
