"""Loading: the streamed model is the one that transformers loads, up to what was asked of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from qaft.bases import DenseBase, FrozenLinear
from qaft.bases.affine import AffineBase
from qaft.bases.bnb import FourBitBase
from qaft.errors import ModelError, RecipeError
from qaft.models.load import LoadedModel, linear_names, load_model
from qaft.models.source import open_source
from qaft.quant import build_quantizer
from qaft.sections import GridSection, ModelSection, QatSection

PER_CHANNEL = QatSection.model_validate({"weights": {"group_size": None}})
UNROTATED = QatSection.model_validate({"weights": {"group_size": 32}, "rotation": "none"})


def load(folder: Path, *, qat: QatSection | None = None, seed: int = 0, **options: Any) -> LoadedModel:
    layers = {key: options.pop(key) for key in ("latent", "adapted") if key in options}
    section = ModelSection.model_validate({"name": str(folder), "storage": "fp32", "dtype": "float32", **options})
    return load_model(section, qat=qat, seed=seed, **layers)


def plain_logits(folder: Path, tokens: Tensor, **options: Any) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})(tokens).logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
def test_fp32_logits_are_bit_equal_to_transformers(
    write_checkpoint: Callable[..., Path], tokens: Tensor, family: str, tied: bool, shard_size: str
) -> None:
    folder = write_checkpoint(family, tie_word_embeddings=tied, shard_size=shard_size)
    loaded = load(folder)
    assert torch.equal(loaded.model(tokens).logits, plain_logits(folder, tokens))
    assert loaded.tied is tied
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_model_is_bit_equal_to_transformers(stories260k: Path, dtype: str) -> None:
    tokens = torch.arange(3, 103).view(2, 50)
    loaded = load(stories260k, dtype=dtype, storage={"float32": "fp32", "bfloat16": "bf16"}[dtype])
    assert torch.equal(loaded.model(tokens).logits, plain_logits(stories260k, tokens, dtype=getattr(torch, dtype)))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_buffers_that_no_checkpoint_stores_are_those_of_transformers(
    write_checkpoint: Callable[..., Path], rope: dict[str, Any]
) -> None:
    folder = write_checkpoint(rope_parameters=rope)
    buffers = dict(load(folder, dtype="bfloat16").model.model.rotary_emb.named_buffers())
    expected = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).model.rotary_emb.named_buffers())
    assert buffers.keys() == expected.keys() and buffers
    assert all(torch.equal(buffers[name], expected[name]) for name in buffers)
    assert all(buffers[name].dtype == expected[name].dtype for name in buffers)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("storage", ["bf16", "nf4", "fp4", "int8", "int4", "int8_group"])
def test_packed_logits_are_those_of_the_dequantized_weights(
    write_checkpoint: Callable[..., Path], tokens: Tensor, storage: str, family: str
) -> None:
    folder = write_checkpoint(family)
    loaded = load(folder, storage=storage, group_size=32)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    changed = 0
    for name, module in loaded.model.named_modules():
        if isinstance(module, FrozenLinear):
            weight = plain.get_parameter(f"{name}.weight").data
            changed += not torch.equal(weight, module.dequantize().float())
            weight.copy_(module.dequantize())
    assert changed == len(linear_names(loaded.source.config)) == 14
    assert torch.equal(loaded.model(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_model_computes_the_same_function(
    write_checkpoint: Callable[..., Path], tokens: Tensor, family: str, tied: bool
) -> None:
    folder = write_checkpoint(family, tie_word_embeddings=tied)
    loaded, expected = load(folder, qat=PER_CHANNEL), plain_logits(folder, tokens)
    assert (loaded.model(tokens).logits - expected).norm() < 1e-5 * expected.norm()
    assert loaded.tied is tied
    assert torch.equal(loaded.model.model.norm.weight, torch.ones(64))
    assert loaded.originals["model.norm.weight"].std() > 0.1


def test_a_rotated_model_can_be_rotated_back(write_checkpoint: Callable[..., Path]) -> None:
    loaded = load(write_checkpoint("qwen2", tie_word_embeddings=True), qat=PER_CHANNEL)
    assert loaded.fusion is not None
    tensors = {name: parameter.data for name, parameter in loaded.model.named_parameters()}
    for name, module in loaded.model.named_modules():
        if isinstance(module, FrozenLinear):
            tensors[f"{name}.weight"] = module.dequantize()
            if module.bias is not None:
                tensors[f"{name}.bias"] = module.bias
    assert tensors.keys() == {*loaded.source.names(), "lm_head.weight"}
    for name in loaded.source.names():
        restored = loaded.fusion.inverse(name, tensors[name], loaded.originals)
        torch.testing.assert_close(restored, loaded.source.read(name), rtol=1e-5, atol=1e-5)


def test_an_untied_head_is_not_tied_again(write_checkpoint: Callable[..., Path], tokens: Tensor) -> None:
    model = load(write_checkpoint(tie_word_embeddings=True), qat=PER_CHANNEL).model
    before = model(tokens).logits
    model.tie_weights()
    assert torch.equal(model(tokens).logits, before)
    assert not model.config.tie_word_embeddings


def test_rotation_comes_before_quantization(write_checkpoint: Callable[..., Path]) -> None:
    folder = write_checkpoint()
    packed, dense = load(folder, qat=PER_CHANNEL, storage="int4"), load(folder, qat=PER_CHANNEL)
    assert packed.frozen_quantizer is not None
    for name in linear_names(dense.source.config):
        rotated = dense.model.get_submodule(name).dequantize()
        expected = packed.frozen_quantizer.quantize(rotated).dequantize(torch.float32)
        assert torch.equal(packed.model.get_submodule(name).dequantize(), expected)


def test_latents_are_dense_and_everything_else_is_packed(write_checkpoint: Callable[..., Path]) -> None:
    folder = write_checkpoint()
    loaded = load(folder, qat=PER_CHANNEL, storage="int4", dtype="bfloat16", latent=lambda n: n.endswith("v_proj"))
    names = linear_names(loaded.source.config)
    assert "lm_head" not in names and len(names) == 14
    for name in names:
        layer = loaded.model.get_submodule(name)
        assert type(layer) is (DenseBase if name.endswith("v_proj") else AffineBase)
        assert layer.dequantize().dtype == layer.dtype == torch.bfloat16


def test_every_parameter_is_frozen_and_in_memory(write_checkpoint: Callable[..., Path]) -> None:
    model = load(write_checkpoint(), storage="nf4", dtype="bfloat16").model
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not model.training


def test_adapted_layers_keep_plain_block_scales(write_checkpoint: Callable[..., Path]) -> None:
    loaded = load(write_checkpoint(), storage="nf4", double_quant=True, adapted=lambda n: n.endswith("q_proj"))
    for name in linear_names(loaded.source.config):
        layer = loaded.model.get_submodule(name)
        assert isinstance(layer, FourBitBase)
        assert (layer.nested_absmax is None) is name.endswith("q_proj")


def test_the_grid_of_frozen_layers_follows_the_one_that_is_trained() -> None:
    from qaft.models.layers import frozen_quantizer

    def grid(storage: str, qat: QatSection | None) -> tuple[int, int | None, bool] | None:
        section = ModelSection.model_validate({"name": "m", "storage": storage, "group_size": 16})
        found = frozen_quantizer(section, qat)
        return None if found is None else (found.bits, found.group_size, found.symmetric)

    qat = QatSection(weights=GridSection.model_validate({"bits": 4, "group_size": 32, "symmetric": False}))
    assert grid("int4", None) == (4, 16, True)
    assert grid("int4", qat) == (4, 32, False)
    assert grid("int8_group", qat) == (8, 32, False)
    assert grid("nf4", qat) is None
    gguf = QatSection(weights=GridSection.model_validate({"kind": "q4_0"}))
    assert grid("int4", gguf) == (4, 32, True)
    assert grid("int8_group", gguf) == (8, 32, True)


def _store_on_grid(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    quantizer = build_quantizer(UNROTATED.weights, scale_dtype=torch.float32)
    for name in tensors:
        if "proj" in name and name.endswith("weight"):
            tensors[name] = quantizer.quantize(tensors[name]).dequantize(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_latents_of_a_quantized_checkpoint_leave_their_grid_with_the_same_codes(
    write_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture, stored: torch.dtype
) -> None:
    folder = write_checkpoint()
    _store_on_grid(folder, stored)
    quantizer = build_quantizer(UNROTATED.weights, scale_dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        loaded = load(folder, qat=UNROTATED, latent=lambda n: n.endswith(("q_proj", "v_proj")))
    assert [record.args[0] for record in caplog.records if "own grid" in record.message] == [4]  # pyright: ignore[reportOptionalSubscript]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"):
        latents = loaded.model.get_submodule(name).dequantize()
        original = loaded.source.read(f"{name}.weight").float()
        assert quantizer.quantize(latents).equals(quantizer.quantize(original))
        assert (latents - original).abs().max() > 0.1 * original.abs().max() / 7
    repeated = load(folder, qat=UNROTATED, latent=lambda n: n.endswith("v_proj")).model
    assert torch.equal(repeated.get_submodule(name).dequantize(), latents)


def test_dithered_latents_stay_in_fp32_under_a_16_bit_model(write_checkpoint: Callable[..., Path]) -> None:
    folder = write_checkpoint()
    _store_on_grid(folder, torch.float32)
    layer = load(folder, qat=UNROTATED, dtype="bfloat16", latent=lambda n: True).model.model.layers[0].mlp.up_proj
    assert layer.dequantize().dtype == torch.float32 and layer.dtype == torch.bfloat16


def test_latents_that_are_not_on_a_grid_are_stored_as_they_are(
    write_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(write_checkpoint(), qat=UNROTATED, latent=lambda n: True)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(loaded.model.get_submodule(name).dequantize(), loaded.source.read(f"{name}.weight"))
    assert not [record for record in caplog.records if "own grid" in record.message]


@pytest.mark.parametrize("layers", ["latent", "frozen"])
def test_a_group_size_that_does_not_fit_names_layer_width_and_ways_out(
    write_checkpoint: Callable[..., Path], layers: str
) -> None:
    qat = QatSection.model_validate({"weights": {"group_size": 64}})
    with pytest.raises(ModelError, match=r"mlp\.down_proj: its width 96 .* fit every layer: 8, 16, 32, null") as error:
        load(write_checkpoint(), qat=qat, storage="int4", latent=lambda n: layers == "latent")
    assert ("qat.weights)" in str(error.value)) == (layers == "latent")


def test_blocks_of_a_code_book_that_do_not_fit_are_explained(write_checkpoint: Callable[..., Path]) -> None:
    qat = QatSection.model_validate({"weights": {"kind": "nf4"}})
    with pytest.raises(ModelError, match=r"width 96 .* fit every layer: 32$"):
        load(write_checkpoint(), qat=qat, latent=lambda n: True)


def _change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_missing_parameters_are_listed(write_checkpoint: Callable[..., Path]) -> None:
    gone = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    folder = _change_weights(write_checkpoint(), lambda tensors: [tensors.pop(name) for name in gone])
    with pytest.raises(ModelError, match="lacks 2 of 21 parameters") as error:
        load(folder)
    assert all(name in str(error.value) for name in gone)


@pytest.mark.parametrize("qat", [None, PER_CHANNEL], ids=["plain", "rotated"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_shape_that_contradicts_the_config_is_named(
    write_checkpoint: Callable[..., Path], name: str, qat: QatSection | None
) -> None:
    folder = _change_weights(write_checkpoint(), lambda tensors: tensors.update({name: torch.zeros(7, 64)}))
    with pytest.raises(ModelError, match=rf"{name} has shape \[7, 64\]"):
        load(folder, qat=qat)


def test_unexpected_tensors_are_reported_but_obsolete_ones_are_not(
    write_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"model.extra.weight": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    with caplog.at_level(logging.WARNING):
        load(_change_weights(write_checkpoint(), lambda tensors: tensors.update(extra)))
    (message,) = [record.getMessage() for record in caplog.records if "no place" in record.getMessage()]
    assert "1 tensors" in message and "model.extra.weight" in message


def test_a_head_stored_under_its_own_name_is_tied(write_checkpoint: Callable[..., Path], tokens: Tensor) -> None:
    folder = write_checkpoint(tie_word_embeddings=True)
    expected = plain_logits(folder, tokens)
    _change_weights(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    loaded = load(folder)
    assert torch.equal(loaded.model(tokens).logits, expected)
    assert loaded.tied and loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_config_with_two_tensors_follows_the_tensors(
    write_checkpoint: Callable[..., Path], tokens: Tensor, equal: bool
) -> None:
    folder = write_checkpoint(tie_word_embeddings=True)
    factor = 1 if equal else 2
    _change_weights(folder, lambda t: t.update({"lm_head.weight": factor * t["model.embed_tokens.weight"]}))
    loaded = load(folder)
    assert loaded.tied is equal
    assert torch.equal(loaded.model(tokens).logits, plain_logits(folder, tokens))


def test_generation_settings_are_kept_and_the_source_config_is_not_touched(
    write_checkpoint: Callable[..., Path],
) -> None:
    folder = write_checkpoint(tie_word_embeddings=True)
    GenerationConfig(eos_token_id=[3, 5], max_new_tokens=7).save_pretrained(folder)
    before = json.loads((folder / "config.json").read_text())
    loaded = load(folder, qat=PER_CHANNEL)
    assert loaded.model.generation_config.eos_token_id == [3, 5]  # pyright: ignore[reportOptionalMemberAccess]
    assert loaded.source.config.tie_word_embeddings is before["tie_word_embeddings"] is True


def test_an_nf4_checkpoint_in_nf4_storage_is_what_it_was(
    write_checkpoint: Callable[..., Path], tmp_path: Path, tokens: Tensor
) -> None:
    from transformers import BitsAndBytesConfig

    # bitsandbytes' own forward is wrong on CPUs for a width of 96.
    plain = write_checkpoint(intermediate_size=128)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
    packed.save_pretrained(tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "packed" / name).write_bytes((plain / name).read_bytes())
    dense, again = load(tmp_path / "packed"), load(tmp_path / "packed", storage="nf4")
    assert dense.source.quantized_from == "nf4"
    assert torch.equal(dense.model(tokens).logits, again.model(tokens).logits)
    torch.testing.assert_close(again.model(tokens).logits, packed(tokens).logits, rtol=1e-5, atol=1e-5)


def test_double_quant_without_block_scales_is_refused(write_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=r"needs model\.storage nf4 or fp4"):
        load(write_checkpoint(), storage="int8", double_quant=True)


def test_an_attention_that_is_not_there_is_explained(write_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"model\.attention='no_such_attention'"):
        load(write_checkpoint(), attention="no_such_attention")


def test_a_family_without_rotation_loads_unrotated_and_says_why_it_does_not_rotate(
    write_checkpoint: Callable[..., Path], tokens: Tensor
) -> None:
    folder = write_checkpoint("stablelm")
    assert torch.equal(load(folder).model(tokens).logits, plain_logits(folder, tokens))
    with pytest.raises(ModelError, match="not a known architecture"):
        load(folder, qat=PER_CHANNEL)


def test_a_mixture_of_experts_is_refused(write_checkpoint: Callable[..., Path]) -> None:
    folder = write_checkpoint("qwen3_moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32)
    with pytest.raises(ModelError, match="only dense models"):
        load(folder)


def test_a_family_without_linear_modules_is_refused() -> None:
    from transformers import GPT2Config

    with pytest.raises(ModelError, match=r"no torch\.nn\.Linear"):
        linear_names(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8))


def test_linear_names_leave_head_and_embedding_out(write_checkpoint: Callable[..., Path]) -> None:
    names = linear_names(open_source(str(write_checkpoint())).config)
    assert names[:2] == ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    assert len(names) == 14 and not {"lm_head", "model.embed_tokens"} & set(names)
