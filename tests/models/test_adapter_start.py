"""A run that starts from an adapter is, before its first step, the model that PEFT loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_adapter import save_adapter
from tiny_checkpoint import write_checkpoint
from tiny_job import job, train
from transformers import AutoModelForCausalLM

from qaft.build import Run, build_run, restore_run
from qaft.errors import ModelError, RecipeError
from qaft.recipe import parse_recipe
from qaft.updates import LowRank

# PEFT 0.21 asks models of transformers 5.23 by their old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = ["q_proj", "v_proj", "down_proj"]
QAT = {"weights": {"bits": 8, "group_size": 32}, "rotation": "hadamard"}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.0.self_attn.v_proj": 3}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), dtype=torch.float32)


def raw(base: Path, adapter: Path, **sections: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(base), "storage": "fp32", "dtype": "float32", "adapter": str(adapter)},
        "select": {"targets": TARGETS},
        "update": {"kind": "lowrank", "rank": 4, "alpha": 8},
        **sections,
    }


def built(base: Path, adapter: Path, **sections: Any) -> Run:
    return build_run(parse_recipe(raw(base, adapter, **sections)))


def factors(run: Run, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The trained A and B of a layer."""
    update = run.layers[name].update
    assert isinstance(update, LowRank)
    return update.down.detach(), update.up.detach()


@torch.no_grad()
def deviation(run: Run, base: Path, adapter: Path) -> float:
    """The largest difference from PEFT's logits, relative to their size; what the adapter itself does is above 0.1."""
    for layer in run.layers.values():
        layer.quantizer = None
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokens = torch.arange(40).view(2, 20) * 5 % 264
    untrained = plain(tokens).logits
    expected = peft.PeftModel.from_pretrained(plain, adapter).eval()(tokens).logits
    size = float(expected.abs().max())
    assert float((untrained - expected).abs().max()) > 0.1 * size
    return float((run.loaded.model(tokens).logits - expected).abs().max()) / size


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_at_step_0_it_is_the_model_of_peft(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = save_adapter(base, tmp_path, **options)
    assert deviation(built(base, adapter), base, adapter) <= 1e-5


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("gemma", True)])
def test_a_rotated_run_turns_the_factors_with_the_weights(tmp_path: Path, family: str, tied: bool) -> None:
    base = write_checkpoint(tmp_path / "base", family=family, tied=tied, dtype=torch.float32, head_dim=16)
    adapter = save_adapter(base, tmp_path / "lora", target_modules=[*TARGETS, "o_proj", "up_proj"])
    run = built(base, adapter, qat=QAT, select={"targets": [*TARGETS, "o_proj", "up_proj"]})
    assert run.loaded.fusion is not None
    assert deviation(run, base, adapter) <= 1e-5


def test_a_larger_rank_leaves_room_that_starts_as_without_the_adapter(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path)
    run = built(base, adapter, update={"kind": "lowrank", "rank": 7, "alpha": 3})
    plain = build_run(parse_recipe({**raw(base, adapter), "model": {"name": str(base)}, "update": {"rank": 7}}))
    for name in run.layers:
        (down, up), (fresh, _) = factors(run, name), factors(plain, name)
        torch.testing.assert_close(down[4:], fresh[4:], rtol=0, atol=0)
        assert not up[:, 4:].any()
    assert deviation(run, base, adapter) <= 1e-5


def test_layers_beyond_the_adapter_start_as_without_it(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path, target_modules=["q_proj"])
    run = built(base, adapter, select={"targets": ["q_proj", "up_proj"]})
    assert {name.rpartition(".")[2] for name in run.layers if factors(run, name)[1].any()} == {"q_proj"}


def test_a_layernorm_that_the_rotation_moves_is_refused(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", family="gpt_neox", dtype=torch.float32)
    adapter = save_adapter(base, tmp_path / "lora", target_modules=["query_key_value"])
    select = {"targets": ["query_key_value"]}
    assert deviation(built(base, adapter, select=select, qat={**QAT, "rotation": "none"}), base, adapter) <= 1e-5
    with pytest.raises(ModelError, match=r"input_layernorm.*set qat\.rotation to none"):
        built(base, adapter, select=select, qat=QAT)


def test_layers_after_no_layernorm_are_turned(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", family="gpt_neox", dtype=torch.float32)
    adapter = save_adapter(base, tmp_path / "lora", target_modules=["dense", "dense_4h_to_h"])
    select = {"targets": [r"attention\.dense", "dense_4h_to_h"]}
    assert deviation(built(base, adapter, select=select, qat=QAT), base, adapter) <= 1e-5


@pytest.mark.parametrize(
    ("options", "sections", "error", "message"),
    [
        ({}, {"select": {"targets": ["q_proj"]}}, RecipeError, "which select.targets leaves out"),
        ({}, {"update": {"rank": 3}}, RecipeError, "rank=3 cannot hold factors of rank 4"),
        ({"target_modules": ["lm_head", "q_proj"]}, {}, ModelError, "lm_head .* is no linear layer of the blocks"),
    ],
    ids=["unselected", "rank", "head"],
)
def test_an_adapter_that_would_not_be_whole_is_refused(
    base: Path, tmp_path: Path, options: dict[str, Any], sections: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        built(base, save_adapter(base, tmp_path, **options), **sections)


def test_an_adapter_of_a_wider_model_is_refused(base: Path, tmp_path: Path) -> None:
    wider = write_checkpoint(tmp_path / "wider", hidden_size=128)
    with pytest.raises(ModelError, match=r"is for a weight of \[.*128\], and this base has \[64, 64\]"):
        built(base, save_adapter(wider, tmp_path / "lora", target_modules=["q_proj"]))


def test_a_run_that_was_saved_needs_the_adapter_no_more(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "lora")
    sections = {**raw(base, adapter), "train": {"steps": 1, "output": str(tmp_path / "run")}}
    run = train(job(base, tmp_path, **sections))
    shutil.rmtree(adapter)
    restored = restore_run(tmp_path / "run")
    for name in run.layers:
        _, up = factors(run, name)
        torch.testing.assert_close(factors(restored, name)[1], up, rtol=0, atol=0)
        assert up.abs().max() > 0.05
