from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qaft.arch.base import Arch
from qaft.arch.llama import LLAMA
from qaft.errors import ModelError, RecipeError
from qaft.rotation import places as places_module
from qaft.rotation.places import Place, Side, places_of

ARCH = Arch(family=LLAMA, num_layers=2, hidden_size=48, head_dim=20, num_heads=6, num_kv_heads=2, tied=False)
LAYER = "model.layers.1"


def _dense(side: Side | None, width: int) -> torch.Tensor:
    """I (x) R as a dense block-diagonal matrix."""
    if side is None:
        return torch.eye(width, dtype=torch.float64)
    block = side.rotation(torch.eye(side.rotation.size, dtype=torch.float64))
    return torch.block_diag(*[block] * side.blocks)


@pytest.fixture
def places() -> dict[str, Place]:
    return places_of(ARCH, rotation="hadamard", seed=3)


@pytest.mark.parametrize("chunk", [1, 2000, 2**18])
@pytest.mark.parametrize(
    ("part", "shape", "norm"),
    [
        ("self_attn.q_proj", (120, 48), "input_layernorm"),
        ("self_attn.v_proj", (40, 48), "input_layernorm"),
        ("self_attn.o_proj", (48, 120), None),
        ("mlp.up_proj", (72, 48), "post_attention_layernorm"),
        ("mlp.down_proj", (48, 72), None),
    ],
)
def test_a_weight_becomes_the_dense_product_whatever_the_chunk(
    places: dict[str, Place],
    part: str,
    shape: tuple[int, int],
    norm: str | None,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    monkeypatch.setattr(places_module, "CHUNK_ELEMENTS", chunk)
    place = places[f"{LAYER}.{part}"]
    assert place.norm == (None if norm is None else f"{LAYER}.{norm}.weight")
    weight = torch.randn(shape, dtype=torch.float64, generator=generator)
    gamma = None if norm is None else torch.rand(shape[1], dtype=torch.float64, generator=generator) + 0.5
    scaled = weight if gamma is None else weight @ torch.diag(gamma)
    expected = _dense(place.writes, shape[0]).T @ scaled @ _dense(place.reads, shape[1])

    fused = place.fuse(weight, gamma)

    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, expected.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(place.restore(expected, gamma), weight.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("part", "width"), [("self_attn.v_proj", 40), ("self_attn.o_proj", 48), ("mlp.gate_proj", 72)])
def test_a_bias_follows_the_output_side(
    places: dict[str, Place], part: str, width: int, generator: torch.Generator
) -> None:
    place = places[f"{LAYER}.{part}"]
    bias = torch.randn(width, dtype=torch.float64, generator=generator)
    expected = bias @ _dense(place.writes, width)
    torch.testing.assert_close(place.fuse_bias(bias), expected.float())
    torch.testing.assert_close(place.restore_bias(expected), bias.float())


def test_value_and_output_of_a_layer_share_a_rotation_that_other_layers_do_not_use(places: dict[str, Place]) -> None:
    sides = []
    for layer in range(2):
        value, output = (places[f"model.layers.{layer}.self_attn.{part}_proj"] for part in "vo")
        assert value.writes is not None and output.reads is not None
        assert value.writes.rotation is output.reads.rotation
        assert (value.writes.blocks, output.reads.blocks) == (2, 6)
        sides.append(_dense(value.writes, 40))
    assert not torch.equal(*sides)


def test_residual_and_value_rotations_of_equal_width_differ() -> None:
    places = places_of(replace(ARCH, hidden_size=20), rotation="hadamard", seed=0)
    value = places[f"{LAYER}.self_attn.v_proj"]
    assert value.reads is not None and value.writes is not None
    assert not torch.equal(_dense(value.reads, 20), _dense(replace(value.writes, blocks=1), 20))


def test_none_changes_no_module() -> None:
    assert places_of(ARCH, rotation="none", seed=0) == {}


@pytest.mark.parametrize("field", ["hidden_size", "head_dim"])
def test_a_width_without_a_rotation_is_refused_with_its_config_key(field: str) -> None:
    with pytest.raises(ModelError, match=rf"^{field}=90: rotation over 90 elements"):
        places_of(replace(ARCH, **{field: 90}), rotation="hadamard", seed=0)


def test_an_unknown_rotation_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"qat\.rotation='givens'"):
        places_of(ARCH, rotation="givens", seed=0)


def test_norms_that_add_one_to_their_weight_are_refused() -> None:
    arch = replace(ARCH, family=replace(LLAMA, norm="rms_plus_one"))
    with pytest.raises(ModelError, match="'rms_plus_one' cannot be folded"):
        places_of(arch, rotation="hadamard", seed=0)
