from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
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
CONFIGS: dict[str, PretrainedConfig] = {
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
    named = {arch.family.embedding, *arch.writers(), *(name.rpartition(".")[0] for name in arch.untouched())}
    named |= {name for norm, linears in arch.readers() for name in (norm, *linears)}
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
        assert model.get_parameter(f"{value}.weight").shape[0] == arch.num_kv_heads * arch.head_dim
        assert model.get_parameter(f"{output}.weight").shape[1] == arch.num_heads * arch.head_dim


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_rows_of_a_linear_divide_into_its_heads(family: str) -> None:
    config = CONFIGS[family]
    model = _model(family)
    for name, module in model.named_modules():
        heads = heads_of(config, name)
        part = name.rpartition(".")[2]
        assert heads == {"q_proj": 4, "k_proj": 2, "v_proj": 2}.get(part)
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
    with pytest.raises(ModelError, match=r"model_type='gpt2' is not .* one of llama, mistral, qwen2, qwen3"):
        arch_of(GPT2Config())
