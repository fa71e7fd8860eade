from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.configuration_utils import PretrainedConfig

from qaft.arch import FAMILIES, arch_of, heads_of
from qaft.errors import ModelError

SIZES = {
    "vocab_size": 32,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ONE_KEY_PER_QUERY = {key: size for key, size in SIZES.items() if key != "num_key_value_heads"}
CONFIGS: dict[str, PretrainedConfig] = {
    "gemma": GemmaConfig(**SIZES, head_dim=20),
    "gemma2": Gemma2Config(**SIZES, head_dim=20),
    "gemma3_text": Gemma3TextConfig(**SIZES, head_dim=20),
    "gpt_neox": GPTNeoXConfig(**ONE_KEY_PER_QUERY),
    "opt": OPTConfig(**ONE_KEY_PER_QUERY, ffn_dim=40, word_embed_proj_dim=48),
    "phi": PhiConfig(**SIZES, qk_layernorm=True),
    "phi3": Phi3Config(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "llama": LlamaConfig(**SIZES, head_dim=20),
    "mistral": MistralConfig(**SIZES, head_dim=20),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=20),
}


def _model(family: str) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS[family])


def test_every_known_family_is_tested() -> None:
    assert sorted(CONFIGS) == sorted(FAMILIES)
    assert all(name == family.model_type for name, family in FAMILIES.items())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_names_of_a_table_are_exactly_the_modules_with_parameters(family: str) -> None:
    arch = arch_of(CONFIGS[family])
    model = _model(family)
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    named = {*arch.sources(), *arch.writers(), *(name.rpartition(".")[0] for name in arch.untouched())}
    named |= {name for norm, linears in arch.readers() for name in (norm, *linears)}
    named |= {name for template in arch.family.output_norms for name in arch.names_of(template)}
    rotary = {name for name in named if name.endswith("rotary_emb")}
    assert named - rotary == owners


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_widths_of_a_table_are_those_of_the_model(family: str) -> None:
    arch = arch_of(CONFIGS[family])
    model = _model(family)
    for norm, linears in arch.readers():
        assert model.get_parameter(f"{norm}.weight").shape == (arch.hidden_size,)
        assert {model.get_parameter(f"{name}.weight").shape[1] for name in linears} == {arch.hidden_size}
    assert {model.get_parameter(f"{name}.weight").shape[0] for name in arch.writers()} == {arch.hidden_size}
    for value, output in arch.value_outputs():
        heads, of_values = arch.value_heads()
        assert len(of_values) == arch.num_kv_heads
        assert model.get_parameter(f"{value}.weight").shape[0] == heads * arch.head_dim
        assert model.get_parameter(f"{output}.weight").shape[1] == arch.num_heads * arch.head_dim


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_rows_of_a_linear_divide_into_its_heads(family: str) -> None:
    config = CONFIGS[family]
    model = _model(family)
    for name, module in model.named_modules():
        heads = heads_of(config, name)
        part = name.rpartition(".")[2]
        kv = 4 if family == "opt" else 2
        assert heads == {"q_proj": 4, "k_proj": kv, "v_proj": kv, "qkv_proj": 8, "query_key_value": 12}.get(part)
        if heads is not None:
            assert module.get_parameter("weight").shape[0] == heads * arch_of(config).head_dim


def test_readers_come_in_the_order_of_depth_and_end_with_the_head() -> None:
    readers = arch_of(CONFIGS["llama"]).readers()
    assert readers[0] == (
        "model.layers.0.input_layernorm",
        tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv"),
    )
    assert readers[3] == (
        "model.layers.1.post_attention_layernorm",
        ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"),
    )
    assert readers[-1] == ("model.norm", ("lm_head",))
    assert len(readers) == 2 * 3 + 1


def test_a_template_with_a_layer_stands_for_one_name_per_layer() -> None:
    arch = arch_of(CONFIGS["qwen2"])
    assert arch.names_of(arch.family.down) == tuple(f"model.layers.{i}.mlp.down_proj" for i in range(3))
    assert arch.names_of(arch.family.final_norm) == ("model.norm",)


def test_the_head_dimension_comes_from_the_config_and_falls_back_to_the_hidden_size() -> None:
    assert arch_of(CONFIGS["qwen3"]).head_dim == 20
    assert arch_of(CONFIGS["qwen2"]).head_dim == 12
    assert arch_of(MistralConfig(**SIZES, head_dim=None)).head_dim == 12


@pytest.mark.parametrize("tied", [True, False])
def test_tying_is_read_from_the_config(tied: bool) -> None:
    assert arch_of(Qwen2Config(**SIZES, tie_word_embeddings=tied)).tied is tied


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    known = "gemma, gemma2, gemma3_text, gpt_neox, llama, mistral, opt, phi, phi3, qwen2, qwen3"
    with pytest.raises(ModelError, match=rf"model_type='gpt2' is not .* one of {known}"):
        arch_of(GPT2Config())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_attention_module_of_a_layer_holds_its_output(family: str) -> None:
    arch = arch_of(CONFIGS[family])
    assert all(
        output.startswith(f"{a}.") for a, (_, output) in zip(arch.attentions(), arch.value_outputs(), strict=True)
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_rows_of_up_are_those_that_down_reads(family: str) -> None:
    arch = arch_of(CONFIGS[family])
    model = _model(family)
    rows, gated = arch.up_rows()
    for up, down in arch.up_downs():
        assert model.get_parameter(f"{up}.weight").shape[0] == rows
        assert model.get_parameter(f"{down}.weight").shape[1] == arch.intermediate_size
    assert len(gated) == (0 if family in ("gpt_neox", "opt", "phi") else arch.intermediate_size)


@pytest.mark.parametrize(
    ("family", "changes", "norm", "stays"),
    [
        ("gpt_neox", {}, "gpt_neox.layers.1.input_layernorm", False),
        ("gpt_neox", {"attention_bias": False}, "gpt_neox.layers.1.input_layernorm", True),
        ("gpt_neox", {"attention_bias": False}, "gpt_neox.layers.1.post_attention_layernorm", False),
        ("gpt_neox", {}, "gpt_neox.final_layer_norm", True),
        ("opt", {}, "model.decoder.layers.0.final_layer_norm", False),
        ("opt", {"enable_bias": False}, "model.decoder.layers.0.final_layer_norm", True),
        ("opt", {}, "model.decoder.final_layer_norm", True),
        ("phi", {}, "model.layers.2.input_layernorm", False),
        ("phi", {}, "model.final_layernorm", False),
    ],
)
def test_the_bias_of_a_norm_stays_where_a_reader_has_no_bias(
    family: str, changes: dict[str, bool], norm: str, stays: bool
) -> None:
    config = copy.deepcopy(CONFIGS[family])
    for key, value in changes.items():
        setattr(config, key, value)
    assert arch_of(config).shift_stays(norm) is stays
