"""De-rotated exports of every family: the trained function, and the checkpoint itself where nothing was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import write_checkpoint
from tiny_export import INFO, relative_difference, reloaded, section, trained

from qaft.arch import FAMILIES
from qaft.evaluate.difference import compare_logits, logits_of, prompt_ids
from qaft.export import EXPORTERS
from qaft.export.base import FLOOR_16BIT
from qaft.export.tensors import linear_layers
from qaft.models.load import LoadedModel
from qaft.rotation.choice import Choice
from qaft.sections import GridSection, QatSection

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "mistral", "phi", "qwen2")},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "gpt_neox": {"num_key_value_heads": 4},
    "opt": {"num_key_value_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": SPECIAL,
    "qwen3": {"head_dim": 16},
}
LAYER_NORM = ("gpt_neox", "opt", "phi")
GRID = QatSection(weights=GridSection(bits=4, group_size=32))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    written: dict[tuple[str, bool, torch.dtype], Path] = {}

    def make(name: str, tied: bool, dtype: torch.dtype = torch.float32) -> Path:
        key = (name, tied, dtype)
        if key not in written:
            folder = tmp_path_factory.mktemp(name)
            written[key] = write_checkpoint(folder, family=name, tied=tied, dtype=dtype, **OPTIONS[name])
        return written[key]

    return make


def run(source: Path, name: str, **options: Any) -> LoadedModel:
    # Where each block's output is normalized, the residual stream cannot be rotated: R2 alone.
    choice = Choice.uniform(2, residual=not FAMILIES[name].output_norms, values=True)
    attention = "eager" if name == "gemma2" else "sdpa"
    return trained(source, "both", qat=GRID, choice=choice, attention=attention, **options)


def restored(loaded: LoadedModel, folder: Path) -> dict[str, torch.Tensor]:
    EXPORTERS["merged"](loaded, section("merged", basis="original"), folder, INFO)
    return tensors(folder)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def leaf(template: str) -> str:
    return template.rsplit(".", 1)[-1]


def test_every_family_is_here() -> None:
    assert set(OPTIONS) == set(FAMILIES)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_all_layers_trained_are_the_run_in_the_original_basis(
    family: Any, tmp_path: Path, name: str, tied: bool
) -> None:
    loaded = run(family(name, tied), name, storage="fp32", dtype="float32")
    restored(loaded, tmp_path / "out")
    assert relative_difference(loaded.model, reloaded(tmp_path / "out")) <= 2e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_what_was_frozen_is_the_checkpoint_bit_for_bit_and_tied_as_there(
    family: Any, tmp_path: Path, name: str, tied: bool
) -> None:
    source, down = family(name, tied, torch.bfloat16), leaf(FAMILIES[name].down)
    loaded = run(source, name, select=lambda n: n.endswith(down))
    found, original = restored(loaded, tmp_path / "out"), tensors(source)
    assert found.keys() == original.keys()
    changed = {key for key, tensor in original.items() if not torch.equal(found[key], tensor)}
    assert changed == {f"{n}.weight" for n in linear_layers(loaded.model) if n.endswith(down)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied


@pytest.mark.parametrize("name", LAYER_NORM)
def test_the_bias_beside_a_trained_reader_of_a_layer_norm_gives_back_what_it_took_up(
    family: Any, tmp_path: Path, name: str
) -> None:
    source, up = family(name, False), leaf(FAMILIES[name].up)
    loaded = run(source, name, storage="fp32", dtype="float32", select=lambda n: n.endswith(up))
    found, original = restored(loaded, tmp_path / "out"), tensors(source)
    layers = [n for n in linear_layers(loaded.model) if n.endswith(up)]
    changed = {key for key, tensor in original.items() if not torch.equal(found[key], tensor)}
    assert changed == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert loaded.fusion is not None
    for layer in layers:
        norm = next(norm for norm, readers in loaded.fusion.arch.readers() if layer in readers)
        moved = (found[f"{layer}.weight"] - original[f"{layer}.weight"]).double() @ original[f"{norm}.bias"].double()
        shift = (found[f"{layer}.bias"] - original[f"{layer}.bias"]).double()
        torch.testing.assert_close(shift, -moved, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_sixteen_bits_stay_at_the_rounding_floor(family: Any, tmp_path: Path, name: str) -> None:
    loaded = run(family(name, True, torch.bfloat16), name)
    restored(loaded, tmp_path / "out")
    ids = prompt_ids(loaded.tokenizer)
    FLOOR_16BIT.check(compare_logits(logits_of(loaded.model, ids), logits_of(tmp_path / "out", ids)))
