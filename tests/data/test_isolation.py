from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qaft.data.isolation import check_isolation
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
