from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qaft.arch.base import Arch
from qaft.arch.llama import LLAMA
from qaft.arch.qwen3 import QWEN3
from qaft.errors import ModelError
from qaft.rotation.fuse import Fusion

ARCH = Arch(
    family=LLAMA,
    num_layers=2,
    hidden_size=48,
    intermediate_size=72,
    head_dim=20,
    num_heads=6,
    num_kv_heads=2,
    tied=True,
)
UP, GAMMA = "model.layers.0.mlp.up_proj.weight", "model.layers.0.post_attention_layernorm.weight"


@pytest.fixture
def fusion() -> Fusion:
    return Fusion(ARCH, seed=5)


@pytest.fixture
def norms(fusion: Fusion, generator: torch.Generator) -> dict[str, Tensor]:
    return {name: torch.rand(48, generator=generator) + 0.5 for name in fusion.norm_names}


def test_the_norms_to_read_are_two_per_layer_and_the_last(fusion: Fusion) -> None:
    assert fusion.norm_names == (
        *(f"model.layers.0.{norm}_layernorm.weight" for norm in ("input", "post_attention")),
        *(f"model.layers.1.{norm}_layernorm.weight" for norm in ("input", "post_attention")),
        "model.norm.weight",
    )


def test_norms_become_one_and_come_back_exactly(fusion: Fusion, norms: dict[str, Tensor]) -> None:
    fused = fusion.forward(GAMMA, norms[GAMMA], norms)
    assert torch.equal(fused, torch.ones(48))
    assert torch.equal(fusion.inverse(GAMMA, fused, norms), norms[GAMMA])


def test_the_embedding_is_rotated_without_any_norm(fusion: Fusion, generator: torch.Generator) -> None:
    embedding = torch.randn(7, 48, generator=generator)
    fused = fusion.forward("model.embed_tokens.weight", embedding, {})
    torch.testing.assert_close(fused @ fused.T, embedding @ embedding.T)


def test_a_tied_head_is_made_from_the_embedding_and_gives_it_back(
    fusion: Fusion, norms: dict[str, Tensor], generator: torch.Generator
) -> None:
    embedding = torch.randn(7, 48, generator=generator)
    rotated = fusion.forward("model.embed_tokens.weight", torch.eye(48), norms)
    head = fusion.forward("lm_head.weight", embedding, norms)
    torch.testing.assert_close(head, embedding * norms["model.norm.weight"] @ rotated)
    torch.testing.assert_close(fusion.inverse("lm_head.weight", head, norms), embedding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_result_is_fp32_and_the_input_is_left_alone(
    fusion: Fusion, norms: dict[str, Tensor], dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight = torch.randn(9, 48, generator=generator).to(dtype)
    before = weight.clone()
    fused = fusion.forward(UP, weight, norms)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, fusion.forward(UP, weight.double(), norms))
    assert torch.equal(weight, before)


def test_head_norms_of_queries_and_keys_are_left_alone() -> None:
    fusion = Fusion(replace(ARCH, family=QWEN3))
    weight = torch.arange(20.0)
    name = "model.layers.1.self_attn.q_norm.weight"
    for result in (fusion.forward(name, weight, {}), fusion.inverse(name, weight, {})):
        assert torch.equal(result, weight)
        assert result.data_ptr() != weight.data_ptr()


def test_the_seed_defines_the_rotation(fusion: Fusion, norms: dict[str, Tensor], generator: torch.Generator) -> None:
    again = Fusion(ARCH, seed=5)
    other = Fusion(ARCH, seed=6)
    weight = torch.randn(9, 48, generator=generator)
    assert torch.equal(again.forward(UP, weight, norms), fusion.forward(UP, weight, norms))
    assert not torch.equal(other.forward(UP, weight, norms), fusion.forward(UP, weight, norms))
    assert repr(fusion) == "Fusion(llama, rotation='hadamard', seed=5)"


def test_none_leaves_every_parameter_and_the_tying(generator: torch.Generator) -> None:
    fusion = Fusion(ARCH, rotation="none")
    weight = torch.randn(9, 48, generator=generator)
    assert not fusion.untied() and fusion.norm_names == ()
    for name in (UP, GAMMA, "lm_head.weight"):
        assert torch.equal(fusion.forward(name, weight, {}), weight)
        assert torch.equal(fusion.inverse(name, weight, {}), weight)


def test_a_rotation_unties_the_head(fusion: Fusion) -> None:
    assert fusion.untied()


@pytest.mark.parametrize(
    "name",
    ["model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.experts.0.w1.weight", "lm_head.scale", "weight", ""],
)
def test_a_parameter_outside_the_family_is_refused(fusion: Fusion, norms: dict[str, Tensor], name: str) -> None:
    with pytest.raises(ModelError, match="is not a parameter of the family 'llama'"):
        fusion.forward(name, torch.ones(48, 48), norms)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        (UP, (9, 96), r"\[any, 48\]"),
        (UP, (48,), r"\[any, 48\]"),
        (GAMMA, (47,), r"\[48\]"),
        ("model.layers.0.self_attn.v_proj.weight", (48, 48), r"\[40, 48\]"),
        ("model.layers.0.self_attn.o_proj.weight", (48, 48), r"\[48, 120\]"),
        ("model.layers.0.self_attn.v_proj.bias", (20,), r"\[40\]"),
        ("model.layers.0.mlp.up_proj.bias", (9, 1), r"\[any\]"),
    ],
)
def test_a_shape_that_contradicts_the_config_is_refused(
    fusion: Fusion, name: str, shape: tuple[int, ...], wanted: str
) -> None:
    with pytest.raises(ModelError, match=rf"^{name} has shape .* implies {wanted}"):
        fusion.check(name, torch.ones(shape, device="meta"))


def test_packed_weights_are_refused(fusion: Fusion, norms: dict[str, Tensor]) -> None:
    with pytest.raises(ModelError, match=r"stored as torch\.uint8: a packed weight cannot be rotated"):
        fusion.forward(UP, torch.ones(9, 48, dtype=torch.uint8), norms)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_norm_that_was_not_read_is_named(fusion: Fusion, direction: str) -> None:
    with pytest.raises(ModelError, match=f"^{GAMMA} must be read before"):
        getattr(fusion, direction)(UP, torch.ones(9, 48), {})


def test_a_zero_in_a_norm_can_be_folded_but_not_undone(fusion: Fusion, norms: dict[str, Tensor]) -> None:
    norms[GAMMA][3] = 0
    fused = fusion.forward(UP, torch.ones(9, 48), norms)
    with pytest.raises(ModelError, match=rf"^{GAMMA.removesuffix('.weight')} holds zeros: {UP} cannot be brought back"):
        fusion.inverse(UP, fused, norms)


def test_a_norm_that_was_trained_cannot_be_undone(fusion: Fusion, norms: dict[str, Tensor]) -> None:
    with pytest.raises(ModelError, match=f"^{GAMMA} was trained in the fused basis"):
        fusion.inverse(GAMMA, torch.full((48,), 1.01), norms)
