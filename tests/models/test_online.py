"""Online rotations cancel what is fused, on every family; quantizers see what they are meant to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import write_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qaft.arch import FAMILIES, arch_of
from qaft.errors import ModelError
from qaft.layers.inputs import LayerInput, input_of, put_before
from qaft.models.attention import attention_inputs
from qaft.models.load import LoadedModel, load_model
from qaft.models.online import put_online
from qaft.rotation.choice import Choice
from qaft.sections import GridSection, ModelSection, QatSection

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "gpt_neox": {"num_key_value_heads": 4},
    "llama": {},
    "mistral": {},
    "opt": {"num_key_value_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": SPECIAL,
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}
QAT = QatSection(weights=GridSection(bits=4, group_size=32))
EVERYTHING = Choice.uniform(2, residual=True, values=True, attention=True, down=True)
IDS = torch.arange(24).reshape(2, 12) * 7 % 61


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    written: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in written:
            place = tmp_path_factory.mktemp(family)
            written[family] = write_checkpoint(place, family=family, dtype=torch.float32, **OPTIONS[family])
        return written[family]

    return make


def load(path: Path, choice: Choice, *, storage: str = "fp32", attention: str = "sdpa") -> LoadedModel:
    section = ModelSection(name=str(path), storage=storage, dtype="float32", attention=attention)
    return load_model(section, qat=QAT, choice=choice)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def error(model: Any, reference: Tensor) -> float:
    return float((logits(model) - reference).norm() / reference.norm())


class Record(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x


def test_every_family_is_here() -> None:
    assert set(OPTIONS) == set(FAMILIES)


# Gemma 2 caps its scores, which transformers has in eager attention only.
@pytest.mark.parametrize(
    ("family", "attention"), [(f, a) for f in OPTIONS for a in ("sdpa", "eager") if (f, a) != ("gemma2", "sdpa")]
)
def test_with_every_rotation_a_model_is_the_original_function(
    folder: Callable[[str], Path], family: str, attention: str
) -> None:
    path = folder(family)
    reference = logits(AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention).eval())
    arch = arch_of(AutoModelForCausalLM.from_pretrained(path).config)
    choice = Choice.uniform(2, residual=arch.residual_obstacle is None, values=True, attention=True, down=True)
    loaded = load(path, choice, attention=attention)
    without = error(loaded.model, reference)
    put_online(loaded.model, arch, choice)
    assert error(loaded.model, reference) <= 1e-5 < 1e-2 < without


def test_the_choice_is_followed_layer_by_layer(folder: Callable[[str], Path]) -> None:
    choice = Choice.of_layers(2, residual=False, values=[1], attention=[0], down=[1])
    loaded = load(folder("llama"), choice)
    reference = logits(AutoModelForCausalLM.from_pretrained(folder("llama")).eval())
    assert loaded.fusion is not None and set(loaded.fusion.places) == {
        f"model.layers.1.{part}" for part in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    }
    put_online(loaded.model, loaded.fusion.arch, choice)
    layers = loaded.model.model.layers
    assert [attention_inputs(layer.self_attn) is not None for layer in layers] == [True, False]
    assert [input_of(layer.mlp.down_proj) is not None for layer in layers] == [False, True]
    assert error(loaded.model, reference) <= 1e-5


def test_a_cache_quantizer_sees_keys_after_the_positions_and_values(folder: Callable[[str], Path]) -> None:
    loaded = load(folder("llama"), Choice.uniform(2, residual=False, values=False))
    cache = Record()
    assert loaded.fusion is not None
    put_online(loaded.model, loaded.fusion.arch, loaded.fusion.choice, cache=cache)
    loaded.model(input_ids=IDS, use_cache=False)
    keys, values = cache.seen[:2]
    assert keys.shape == values.shape == (2, 2, 12, 16)
    # In a cache the keys are those after RoPE too.
    plain = AutoModelForCausalLM.from_pretrained(folder("llama")).eval()
    with torch.no_grad():
        expected = plain(input_ids=IDS, use_cache=True).past_key_values.layers[0]
    torch.testing.assert_close(keys, expected.keys)
    torch.testing.assert_close(values, expected.values)


def test_quantized_inputs_are_those_of_layers_in_integers_after_the_rotation(folder: Callable[[str], Path]) -> None:
    choice = Choice.uniform(2, residual=False, values=False, down=True)
    inputs = Record()
    for storage, expected in (("fp32", 0), ("int4", 14), ("nf4", 0)):
        loaded = load(folder("llama"), choice, storage=storage)
        assert loaded.fusion is not None
        inputs.seen.clear()
        put_online(loaded.model, loaded.fusion.arch, choice, inputs=inputs)
        loaded.model(input_ids=IDS, use_cache=False)
        assert len(inputs.seen) == expected


def test_gradients_pass_through_an_online_rotation(folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    loaded = load(path, EVERYTHING)
    assert loaded.fusion is not None
    put_online(loaded.model, loaded.fusion.arch, EVERYTHING)
    grads = []
    for model in (plain, loaded.model):
        embeds = plain.get_input_embeddings()(IDS).detach()
        if model is loaded.model:
            embeds = loaded.fusion.places["model.embed_tokens"].reads.apply(embeds)
        embeds.requires_grad_()
        model(inputs_embeds=embeds, use_cache=False).logits.pow(2).mean().backward()
        grads.append(embeds.grad.norm())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=0)


def test_an_attention_that_cannot_be_wrapped_is_refused(folder: Callable[[str], Path]) -> None:
    loaded = load(folder("llama"), EVERYTHING, attention="flex_attention")
    assert loaded.fusion is not None
    with pytest.raises(ModelError, match=r"model\.attention='flex_attention'.*must be one of eager, sdpa"):
        put_online(loaded.model, loaded.fusion.arch, EVERYTHING)


def test_the_inputs_of_a_layer_are_transformed_once() -> None:
    layer = nn.Linear(4, 4)
    put_before(layer, LayerInput())
    with pytest.raises(ValueError, match="transformed already"):
        put_before(layer, LayerInput())
