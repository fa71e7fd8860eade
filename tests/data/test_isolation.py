from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qaft.data.isolation import check_isolation, check_options
from qaft.errors import IncompatibleError


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=True,
        **options,
    )
    return LlamaForCausalLM(config)


class CachingLlama(nn.Module):
    """A Llama that is called with a cache: transformers then does not look for packed samples."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def forward(self, use_cache: bool, **inputs: Tensor) -> Any:
        return self.model(**inputs, use_cache=True)


class RunningMean(nn.Module):
    """A recurrent layer: every position sees all before it, whatever the positions say."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 4)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.embed(input_ids).cumsum(1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_keeps_samples_apart_passes_and_keeps_its_mode(attention: str, dtype: torch.dtype) -> None:
    model = llama(attn_implementation=attention, attention_dropout=0.5).to(dtype).train()
    check_isolation(model, vocab_size=20)
    assert model.training


@pytest.mark.parametrize("model", [CachingLlama(), RunningMean()], ids=["cache", "recurrent"])
def test_a_model_that_leaks_is_refused_with_the_way_out(model: nn.Module) -> None:
    with pytest.raises(IncompatibleError, match=r"data.packing=true: .* set data.packing: false"):
        check_isolation(model, vocab_size=20)


def ignoring(*inputs: str) -> LlamaForCausalLM:
    """A Llama whose decoder does not read these inputs."""
    model, nothing = llama(), dict.fromkeys(inputs)
    model.model.register_forward_pre_hook(lambda _, args, given: (args, {**given, **nothing}), with_kwargs=True)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_keeps_options_apart_passes_and_keeps_its_mode(attention: str, dtype: torch.dtype) -> None:
    model = llama(attn_implementation=attention, attention_dropout=0.5).to(dtype).train()
    check_options(model, vocab_size=20, max_length=64)
    assert model.training


def test_a_model_whose_options_see_each_other_is_refused_with_the_way_out() -> None:
    with pytest.raises(IncompatibleError, match=r"loss=options .* an option sees the one before it .*loss: answer"):
        check_options(ignoring("attention_mask", "position_ids"), vocab_size=20, max_length=64)


@pytest.mark.parametrize(("ignored", "unseen"), [("attention_mask", "prompt"), ("position_ids", "position")])
def test_a_model_that_does_not_see_where_an_option_stands_is_refused(ignored: str, unseen: str) -> None:
    # Without the mask, positions that go back look like a packed sample that begins.
    with pytest.raises(IncompatibleError, match=f"the {unseen} of the second option changes nothing in it"):
        check_options(ignoring(ignored), vocab_size=20, max_length=64)


def test_attention_without_a_mask_is_refused() -> None:
    model = llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(IncompatibleError, match=r"model\.attention='flash_attention_2' .* must be one of eager, sdpa"):
        check_options(model, vocab_size=20, max_length=64)


def test_layers_that_look_back_less_far_than_a_row_is_long_are_refused() -> None:
    model = llama()
    model.config.sliding_window = 32
    check_options(model, vocab_size=20, max_length=32)
    with pytest.raises(IncompatibleError, match=r"see 32 tokens \(sliding_window\).* data\.max_length to at most 32"):
        check_options(model, vocab_size=20, max_length=33)
