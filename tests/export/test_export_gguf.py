"""GGUF files: trained codes and scales in ggml's blocks, and the trained function in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_checkpoints import MODELS, gguf_grid, packed_model
from tiny_checkpoint import write_checkpoint
from tiny_export import INFO, relative_difference, section, trained

from qaft.bases.affine import AffineBase
from qaft.errors import ExportError, RecipeError
from qaft.export import EXPORTERS
from qaft.export.reload import load
from qaft.export.tensors import linear_layers
from qaft.layers.adapted import AdaptedLinear
from qaft.models.load import load_model
from qaft.models.source import open_source
from qaft.sections import ModelSection

export = EXPORTERS["gguf"]
TYPES = gguf.GGMLQuantizationType
GRIDS: dict[str, tuple[dict[str, Any], gguf.GGMLQuantizationType]] = {
    "q4_0": ({"kind": "q4_0"}, TYPES.Q4_0),
    "q8_0": ({"kind": "q8_0"}, TYPES.Q8_0),
    "mxfp4": ({"kind": "mxfp4"}, TYPES.MXFP4),
    "int4, groups of 32": ({"kind": "int", "group_size": 32, "range": "signed_absmax"}, TYPES.Q4_0),
    "int3, groups of 32": ({"kind": "int", "bits": 3, "group_size": 32}, TYPES.Q4_0),
    "int6, per channel": ({"kind": "int", "bits": 6, "group_size": None}, TYPES.Q8_0),
    "int8, groups of 32": ({"kind": "int", "bits": 8, "group_size": 32}, TYPES.Q8_0),
}
TIED = {"gemma2", "gemma3_text", "llama, tied"}
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


def tensors_of(folder: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row order of llama.cpp for query and key: dimension j and j + d / 2 of a head become neighbours."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def in_file_order(name: str, weight: np.ndarray) -> np.ndarray:
    heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
    return weight if heads is None else paired(weight, heads)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_blocks_hold_the_trained_codes_and_scales(checkpoint: Any, tmp_path: Path, grid: str) -> None:
    options, kind = GRIDS[grid]
    loaded = trained(checkpoint(), "both", qat=gguf_grid(**options))
    export(loaded, section("gguf"), tmp_path / "out", INFO)
    stored = tensors_of(tmp_path / "out")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, layer in linear_layers(loaded.model).items():
        assert isinstance(layer, AdaptedLinear)
        tensor, codes = stored[f"{names.get_name(name)}.weight"], layer.quantized()
        assert tensor.tensor_type == kind and codes is not None
        expected = in_file_order(name, codes.dequantize(torch.float32).numpy())
        assert np.array_equal(gguf.dequantize(tensor.data, kind), expected), name


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_the_bytes_are_those_that_ggml_makes_of_the_latent_weights(checkpoint: Any, tmp_path: Path, kind: str) -> None:
    loaded = trained(checkpoint(), "dense", qat=gguf_grid(kind))
    export(loaded, section("gguf"), tmp_path / "out", INFO)
    stored = tensors_of(tmp_path / "out")
    for name, block in (("self_attn.k_proj", "attn_k"), ("mlp.down_proj", "ffn_down")):
        layer: Any = loaded.model.get_submodule(f"model.layers.1.{name}")
        latent = in_file_order(name, layer.latent().detach().numpy())
        theirs = gguf.quantize(np.ascontiguousarray(latent), TYPES[kind.upper()])
        assert np.array_equal(stored[f"blk.1.{block}.weight"].data, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_the_same_function_in_plain_transformers(tmp_path: Path, name: str) -> None:
    loaded = packed_model(name, tmp_path / "checkpoint")
    export(loaded, section("gguf"), tmp_path / "out", INFO)
    assert relative_difference(loaded.model, load(str(tmp_path / "out"), "cpu", None, None)) <= 1e-5
    stored = tensors_of(tmp_path / "out")
    assert ("output.weight" in stored) is (name not in TIED)
    assert {t.tensor_type for n, t in stored.items() if "attn_output" in n or "ffn_down" in n} == {TYPES.Q4_0}


def test_frozen_and_trained_layers_may_have_blocks_of_different_widths(checkpoint: Any, tmp_path: Path) -> None:
    queries = trained(
        checkpoint(), "dense", qat=gguf_grid("q4_0"), storage="int8_group", select=lambda n: n.endswith("q_proj")
    )
    export(queries, section("gguf"), tmp_path / "out", INFO)
    stored = tensors_of(tmp_path / "out")
    assert stored["blk.0.attn_q.weight"].tensor_type == TYPES.Q4_0
    assert stored["blk.0.attn_v.weight"].tensor_type == TYPES.Q8_0
    frozen: Any = queries.model.get_submodule("model.layers.0.self_attn.v_proj")
    assert isinstance(frozen, AffineBase)
    expected = frozen.qtensor().dequantize(torch.float32).numpy()
    assert np.array_equal(gguf.dequantize(stored["blk.0.attn_v.weight"].data, TYPES.Q8_0), expected)


def test_an_export_is_verified_in_a_fresh_process_and_says_what_it_is(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint(), "both", qat=gguf_grid("q4_0"), select=lambda n: not n.endswith("down_proj"))
    report = export(loaded, section("gguf", verify=True, dtype="float16"), tmp_path / "out", INFO)
    assert report.difference is not None and report.difference.max_relative <= 1e-5
    assert report.rounding is not None and report.rounding.kl_mean < 1e-4
    stored = tensors_of(tmp_path / "out")
    assert stored["token_embd.weight"].tensor_type == stored["blk.0.ffn_down.weight"].tensor_type == TYPES.F16
    assert stored["blk.0.attn_norm.weight"].tensor_type == TYPES.F32
    stamp = json.loads((tmp_path / "out" / "qaft_export.json").read_text())
    assert stamp["grids"] == [{"kind": "q4_0", "bits": 4, "group_size": 32, "symmetric": True}]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "grid: q4_0, groups of 32" in card and 'gguf_file="model.gguf"' in card


def test_an_exported_file_is_a_base_model_again(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAFT_CACHE", str(tmp_path / "cache"))
    loaded = trained(checkpoint(), "dense", qat=gguf_grid("q4_0", rotation="hadamard"))
    export(loaded, section("gguf"), tmp_path / "out", INFO)
    file = str(tmp_path / "out" / "model.gguf")
    again = load_model(ModelSection(name=file), qat=None)
    assert relative_difference(loaded.model, again.model) <= 1e-5
    assert open_source(file).quantized_from == "gguf"
    text = "It's 12:30  and\n\n<|im_start|>user"
    assert again.tokenizer(text).input_ids == loaded.tokenizer(text).input_ids
    assert again.tokenizer.chat_template == loaded.tokenizer.chat_template


OPT = {"family": "opt", "num_key_value_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "code book": ({"kind": "nf4", "group_size": 32}, {}, "q_proj: GGUF has no type for its grid NF4; .*merged"),
    "zero points": ({"kind": "int", "group_size": 32, "symmetric": False}, {}, "q_proj: its grid has zero points"),
    "odd groups": ({"kind": "int", "group_size": 16}, {}, "q_proj: 16 weights share a scale, .* multiple of 32"),
    "odd width": (
        {"kind": "int", "group_size": None},
        {"intermediate_size": 72},
        "down_proj: 72 weights share a scale, but blocks of GGUF hold 32",
    ),
    "fine scales": ({"kind": "int", "group_size": 32}, {}, r"q_proj: its scales .* torch\.float32"),
    "family": ({"kind": "q4_0"}, OPT, "model_type='opt': gguf .*gemma2.*qwen3 only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_gguf_file_holds_is_refused_and_nothing_is_left(tmp_path: Path, case: str) -> None:
    grid, sizes, message = REFUSED[case]
    folder = write_checkpoint(tmp_path / "checkpoint", **sizes)
    dtype = "float32" if case == "fine scales" else "bfloat16"
    loaded = trained(folder, "dense", qat=gguf_grid(**grid), dtype=dtype)
    with pytest.raises(ExportError, match=message):
        export(loaded, section("gguf"), tmp_path / "out", INFO)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_head_of_its_own_is_refused_where_llama_cpp_takes_the_embedding(tmp_path: Path) -> None:
    options = {"head_dim": 16, "query_pre_attn_scalar": 16}
    folder = write_checkpoint(tmp_path / "checkpoint", family="gemma2", tied=False, **options)
    loaded = load_model(ModelSection(name=str(folder), attention="eager"), qat=None)
    with pytest.raises(ExportError, match="has a head of its own"):
        export(loaded, section("gguf"), tmp_path / "out", INFO)


def test_the_original_basis_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"basis='original'.* format merged only; leave it out"):
        export(trained(checkpoint(), qat=gguf_grid("q4_0")), section("gguf", basis="original"), tmp_path / "out", INFO)


def test_a_disk_that_fills_up_within_the_file_leaves_nothing(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = gguf.GGUFWriter.write_tensor_data, iter(range(9))

    def full(self: Any, tensor: Any) -> None:
        if next(count) == 5:
            raise OSError(28, "No space left on device")
        write(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space left"):
        export(trained(checkpoint(), qat=gguf_grid("q4_0")), section("gguf"), tmp_path / "out", INFO)
    assert list(tmp_path.iterdir()) == []
