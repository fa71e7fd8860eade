"""The fused model is the same function, on every family and on a real model; each omission is visible."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from qaft.arch import FAMILIES, arch_of
from qaft.errors import ModelError
from qaft.rotation.choice import Choice
from qaft.rotation.fuse import Fusion, fuse_model

SIZES = {"vocab_size": 61, "num_hidden_layers": 3, "max_position_embeddings": 64, "attn_implementation": "eager"}
SMALL = {**SIZES, "hidden_size": 48, "intermediate_size": 76, "num_attention_heads": 4, "num_key_value_heads": 2}
ODD = {**SIZES, "hidden_size": 144, "intermediate_size": 100, "num_attention_heads": 6, "num_key_value_heads": 1}
NEOX = {**SIZES, "num_attention_heads": 4, "tie_word_embeddings": False}
OPT_SIZES = {**SIZES, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 76, "num_attention_heads": 4}
POST_NORMS = {
    "gemma2": Gemma2Config(**SMALL, head_dim=20, sliding_window=8),
    "gemma3_text": Gemma3TextConfig(**SMALL, head_dim=20, sliding_window=8),
}
CONFIGS = {
    "gemma": GemmaConfig(**ODD, head_dim=20, tie_word_embeddings=False),
    "gemma-tied": GemmaConfig(**SMALL, head_dim=20, attention_bias=True),
    "gpt_neox": GPTNeoXConfig(**NEOX, hidden_size=48, intermediate_size=76),
    "gpt_neox-sequential-tied": GPTNeoXConfig(
        **{**NEOX, "tie_word_embeddings": True}, hidden_size=80, intermediate_size=100, use_parallel_residual=False
    ),
    "gpt_neox-unbiased": GPTNeoXConfig(**NEOX, hidden_size=48, intermediate_size=76, attention_bias=False),
    "opt-tied": OPTConfig(**OPT_SIZES),
    "opt-unbiased": OPTConfig(**OPT_SIZES, enable_bias=False, tie_word_embeddings=False),
    "phi": PhiConfig(**SMALL, qk_layernorm=True),
    "phi-tied": PhiConfig(**SMALL, tie_word_embeddings=True),
    "phi3": Phi3Config(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "phi3-tied": Phi3Config(**ODD, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "llama": LlamaConfig(**SMALL, head_dim=20, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**ODD, head_dim=12, tie_word_embeddings=True),
    "mistral": MistralConfig(**ODD, head_dim=20),
    "qwen2-tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**ODD),
    "qwen3-tied": Qwen3Config(**SMALL, head_dim=20, tie_word_embeddings=True, attention_bias=True),
    "qwen3": Qwen3Config(**ODD, head_dim=12),
}
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 61


def _model(case: str) -> PreTrainedModel:
    """A random fp32 model whose norms differ from one and whose biases differ from zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy({**CONFIGS, **POST_NORMS}[case]), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.3, 1.7)
            else:
                parameter.normal_(0.02, 0.15)
    return model


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS % model.config.vocab_size).logits


def _error(model: PreTrainedModel, reference: Tensor) -> float:
    return float((_logits(model) - reference).norm() / reference.norm())


def _fusion(model: PreTrainedModel) -> Fusion:
    return Fusion(arch_of(model.config), seed=11)


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_every_known_family_is_tested() -> None:
    assert {case.partition("-")[0] for case in (*CONFIGS, *POST_NORMS)} == set(FAMILIES)


@pytest.mark.parametrize("case", CONFIGS)
def test_the_fused_model_is_the_same_function_with_other_weights(case: str) -> None:
    model = _model(case)
    reference, before = _logits(model), _state(model)
    fuse_model(model, _fusion(model))
    assert _error(model, reference) <= 1e-5
    after = model.state_dict()
    for name in (f"{place}.weight" for place in _fusion(model).places):
        assert (after[name] - before[name]).norm() > 0.5 * before[name].norm()
    plain = 0 if case.startswith("gemma") else 1
    assert all(after[name].eq(plain).all() for name in _fusion(model).norm_names if name.endswith("weight"))


@pytest.mark.parametrize("case", CONFIGS)
def test_streaming_the_original_tensors_gives_bit_for_bit_the_fused_model(case: str) -> None:
    model = _model(case)
    fusion, original = _fusion(model), _state(model)
    # A tied checkpoint holds one tensor for both; state_dict lists it under both names.
    streamed = {name: fusion.forward(name, tensor, original) for name, tensor in original.items()}
    fuse_model(model, fusion)
    fused = model.state_dict()
    assert streamed.keys() == fused.keys()
    assert [name for name in fused if not torch.equal(fused[name], streamed[name])] == []


@pytest.mark.parametrize("case", CONFIGS)
def test_the_inverse_brings_every_parameter_back(case: str) -> None:
    model = _model(case)
    fusion, original = _fusion(model), _state(model)
    fuse_model(model, fusion)
    for name, tensor in model.state_dict().items():
        back, expected = fusion.inverse(name, tensor, original), original[name]
        place = fusion.places.get(name.rpartition(".")[0])
        if place is not None and place.centers is not None:
            expected = expected - expected.mean(0 if place.centers == "writes" else -1, keepdim=True)
        assert (back - expected).norm() <= 2e-6 * original[name].norm(), name


@pytest.mark.parametrize("case", POST_NORMS)
def test_a_family_that_normalizes_what_its_blocks_write_keeps_its_residual_basis(case: str) -> None:
    with pytest.raises(ModelError, match=rf"^{case}: the residual stream cannot be rotated: it scales the channels"):
        _fusion(_model(case))


@pytest.mark.parametrize("case", POST_NORMS)
def test_value_heads_can_be_rotated_without_the_residual_stream(case: str) -> None:
    model = _model(case)
    reference, before = _logits(model), _state(model)
    fusion = Fusion(arch_of(model.config), Choice.uniform(3, residual=False, values=True), seed=11)
    fuse_model(model, fusion)
    assert _error(model, reference) <= 1e-5
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in fusion.places}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_opt_350m_which_normalizes_after_its_blocks_is_refused() -> None:
    config = OPTConfig(**OPT_SIZES, do_layer_norm_before=False)
    with pytest.raises(ModelError, match=r"^opt: .* its config has do_layer_norm_before=False, which needs to be True"):
        Fusion(arch_of(config))


@pytest.mark.parametrize("case", ["llama-tied", "qwen3-tied"])
def test_a_tied_model_is_untied_and_survives_saving(case: str, tmp_path: Path) -> None:
    model = _model(case)
    reference = _logits(model)
    fuse_model(model, _fusion(model))
    assert model.config.tie_word_embeddings is False
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(_logits(reloaded), _logits(model))
    assert _error(reloaded, reference) <= 1e-5


def test_none_leaves_a_tied_model_as_it_is() -> None:
    model = _model("llama-tied")
    before = _state(model)
    fuse_model(model, Fusion(arch_of(model.config), rotation="none"))
    assert model.config.tie_word_embeddings is True
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_bf16_model_keeps_its_dtype_and_stays_near() -> None:
    model = _model("qwen2").to(torch.bfloat16)
    reference = _logits(model).float()
    fuse_model(model, _fusion(model))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert _error(model, reference) <= 0.05


def test_a_model_with_a_foreign_parameter_is_refused_before_anything_changes() -> None:
    model = _model("llama")
    fusion = _fusion(model)
    model.model.layers[2].mlp.register_parameter("router", torch.nn.Parameter(torch.ones(3)))
    before = _state(model)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.router is not a parameter"):
        fuse_model(model, fusion)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _center_the_embedding(original: dict[str, Tensor], norms: dict[str, Tensor]) -> None:
    original["model.embed_tokens.weight"] -= original["model.embed_tokens.weight"].mean(-1, keepdim=True)


def _skip_the_norms(original: dict[str, Tensor], norms: dict[str, Tensor]) -> None:
    norms.update({name: torch.ones_like(gamma) for name, gamma in norms.items()})


def _skip_the_last_norm(original: dict[str, Tensor], norms: dict[str, Tensor]) -> None:
    norms["model.norm.weight"] = torch.ones(48)


@pytest.mark.parametrize("mistake", [_center_the_embedding, _skip_the_norms, _skip_the_last_norm])
def test_a_mistake_in_folding_is_far_outside_the_bound(mistake: Callable[..., None]) -> None:
    model = _model("llama")
    reference, original, fusion = _logits(model), _state(model), _fusion(model)
    norms = {name: original[name].clone() for name in fusion.norm_names}
    mistake(original, norms)
    model.load_state_dict({name: fusion.forward(name, tensor, norms) for name, tensor in original.items()})
    assert _error(model, reference) >= 1e-3


@pytest.mark.parametrize("part", ["embed_tokens", "layers.1.self_attn.v_proj", "layers.1.self_attn.o_proj"])
def test_one_weight_in_the_basis_of_another_seed_is_far_outside_the_bound(part: str) -> None:
    model = _model("llama")
    reference, original, fusion = _logits(model), _state(model), _fusion(model)
    norms = {name: original[name] for name in fusion.norm_names}
    name = f"model.{part}.weight"
    fuse_model(model, fusion)
    with torch.no_grad():
        model.get_parameter(name).copy_(Fusion(fusion.arch, seed=12).forward(name, original[name], norms))
    assert _error(model, reference) >= 1e-3


@pytest.mark.parametrize("part", ["self_attn.v_proj.bias", "self_attn.o_proj.bias", "mlp.down_proj.bias"])
def test_a_bias_left_in_the_original_basis_is_far_outside_the_bound(part: str) -> None:
    model = _model("llama")
    reference, original = _logits(model), _state(model)
    fuse_model(model, _fusion(model))
    name = f"model.layers.1.{part}"
    with torch.no_grad():
        model.get_parameter(name).copy_(original[name])
    assert _error(model, reference) >= 1e-3


def test_a_shared_head_that_took_the_last_norm_into_the_embedding_is_far_outside_the_bound() -> None:
    model = _model("llama-tied")
    reference = _logits(model)
    fuse_model(model, _fusion(model))
    model.get_input_embeddings().weight = model.get_output_embeddings().weight
    assert _error(model, reference) >= 1e-1


def test_a_real_model_is_the_same_function_and_comes_back(stories260k: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32).eval()
    reference, original, fusion = _logits(model), _state(model), _fusion(model)
    norms = {name: original[name] for name in fusion.norm_names}
    fuse_model(model, fusion)
    assert _error(model, reference) <= 1e-5
    for name, tensor in model.state_dict().items():
        assert (fusion.inverse(name, tensor, norms) - original[name]).norm() <= 1e-6 * original[name].norm(), name
