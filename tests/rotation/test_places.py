from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qaft.arch.base import Arch, Family
from qaft.arch.gpt_neox import GPT_NEOX
from qaft.arch.llama import LLAMA
from qaft.arch.phi3 import PHI3
from qaft.errors import ModelError, RecipeError
from qaft.rotation import place as place_module
from qaft.rotation.choice import Choice, down_block
from qaft.rotation.place import Place, Side
from qaft.rotation.places import down_rotation, places_of

ARCH = Arch(
    family=LLAMA,
    num_layers=2,
    hidden_size=48,
    intermediate_size=72,
    head_dim=20,
    num_heads=6,
    num_kv_heads=2,
    tied=False,
)
LAYER = "model.layers.1"
FUSED = Choice.uniform(2, residual=True, values=True)
EVERYTHING = Choice.uniform(2, residual=True, values=True, attention=True, down=True)


def _dense(side: Side | None, width: int) -> torch.Tensor:
    """I (x) R as a dense block-diagonal matrix."""
    if side is None:
        return torch.eye(width, dtype=torch.float64)
    block = side.rotation(torch.eye(side.rotation.size, dtype=torch.float64))
    return torch.block_diag(*[block] * side.blocks)


@pytest.fixture
def places() -> dict[str, Place]:
    return places_of(ARCH, FUSED, rotation="hadamard", seed=3)


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
    monkeypatch.setattr(place_module, "CHUNK_ELEMENTS", chunk)
    place = places[f"{LAYER}.{part}"]
    assert place.norm == (None if norm is None else f"{LAYER}.{norm}")
    weight = torch.randn(shape, dtype=torch.float64, generator=generator)
    gamma = None if norm is None else torch.rand(shape[1], dtype=torch.float64, generator=generator) + 0.5
    scaled = weight if gamma is None else weight @ torch.diag(gamma)
    expected = _dense(place.writes, shape[0]).T @ scaled @ _dense(place.reads, shape[1])

    fused = place.fuse(weight, gamma)

    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, expected.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(place.restore(expected, gamma), weight.float(), rtol=1e-6, atol=1e-6)


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
    places = places_of(replace(ARCH, hidden_size=20), FUSED, rotation="hadamard", seed=0)
    value = places[f"{LAYER}.self_attn.v_proj"]
    assert value.reads is not None and value.writes is not None
    assert not torch.equal(_dense(value.reads, 20), _dense(replace(value.writes, blocks=1), 20))


def test_none_changes_no_module() -> None:
    assert places_of(ARCH, Choice.uniform(2, residual=False, values=False), rotation="hadamard", seed=0) == {}


@pytest.mark.parametrize("field", ["hidden_size", "head_dim"])
def test_a_width_without_a_rotation_is_refused_with_its_config_key(field: str) -> None:
    with pytest.raises(ModelError, match=rf"^{field}=90: rotation over 90 elements"):
        places_of(replace(ARCH, **{field: 90}), FUSED, rotation="hadamard", seed=0)


def test_an_unknown_rotation_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"qat\.rotation='givens'"):
        places_of(ARCH, FUSED, rotation="givens", seed=0)


@pytest.mark.parametrize("intermediate", [11008, 13824, 14336, 18944, 9728, 17408, 3584, 76])
def test_the_block_of_down_is_the_largest_power_of_two(intermediate: int) -> None:
    block = down_block(replace(ARCH, intermediate_size=intermediate))
    assert intermediate % block == 0 and intermediate // block % 2 == 1
    assert block & (block - 1) == 0
    assert (
        block
        == {11008: 256, 13824: 512, 14336: 2048, 18944: 512, 9728: 512, 17408: 1024, 3584: 512, 76: 4}[intermediate]
    )


@pytest.mark.parametrize("intermediate", [75, 90])
def test_a_width_without_a_block_is_refused(intermediate: int) -> None:
    with pytest.raises(ModelError, match=rf"^intermediate_size={intermediate}: the largest power of two .* is [12],"):
        places_of(replace(ARCH, intermediate_size=intermediate), EVERYTHING, rotation="hadamard", seed=0)


def test_the_online_part_of_down_undoes_its_fused_one_but_for_signs_that_up_has(generator: torch.Generator) -> None:
    places = places_of(ARCH, EVERYTHING, rotation="hadamard", seed=3)
    online = down_rotation(ARCH, rotation="hadamard")
    up, down = (places[f"{LAYER}.mlp.{part}_proj"] for part in ("up", "down"))
    assert up.writes is not None and down.reads is not None
    x = torch.randn(5, 72, dtype=torch.float64, generator=generator)
    rotated = online(up.writes.apply(x))
    torch.testing.assert_close(rotated, down.reads.apply(x))
    torch.testing.assert_close(down.reads.undo(rotated), x)


def test_the_gate_is_left_alone_where_it_shares_a_linear_with_up(generator: torch.Generator) -> None:
    places = places_of(replace(ARCH, family=PHI3), EVERYTHING, rotation="hadamard", seed=3)
    side = places[f"{LAYER}.mlp.gate_up_proj"].writes
    assert side is not None and side.width == 144
    x = torch.randn(144, dtype=torch.float64, generator=generator)
    turned = side.apply(x)
    assert torch.equal(turned[:72], x[:72])
    assert torch.equal(turned[72:].abs(), x[72:].abs()) and not torch.equal(turned[72:], x[72:])


def test_an_mlp_without_gate_has_no_signs_to_fold() -> None:
    places = places_of(replace(ARCH, family=GPT_NEOX, num_kv_heads=6), EVERYTHING, rotation="hadamard", seed=3)
    down = places["gpt_neox.layers.1.mlp.dense_4h_to_h"]
    assert places["gpt_neox.layers.1.mlp.dense_h_to_4h"].writes is None
    assert down.reads is not None and down.reads.rotation.get_buffer("signs").eq(1).all()


@pytest.mark.parametrize(("family", "first", "step"), [(GPT_NEOX, 2, 3), (PHI3, 8, 1)])
def test_only_the_value_heads_of_a_shared_linear_are_rotated(
    family: Family, first: int, step: int, generator: torch.Generator
) -> None:
    kv = 6 if family is GPT_NEOX else 2
    arch = replace(ARCH, family=family, num_kv_heads=kv)
    side = places_of(arch, EVERYTHING, rotation="hadamard", seed=3)[arch.value_outputs()[1][0]].writes
    assert side is not None and side.width == (18 if family is GPT_NEOX else 10) * 20
    x = torch.randn(side.width, 3, dtype=torch.float64, generator=generator)
    turned = side.apply(x, dim=0).unflatten(0, (-1, 20))
    changed = [head for head, before in enumerate(x.unflatten(0, (-1, 20))) if not torch.equal(turned[head], before)]
    assert changed == list(range(first, side.blocks, step))
    torch.testing.assert_close(side.apply(x.T), side.apply(x, dim=0).T)
    torch.testing.assert_close(side.undo(side.apply(x, dim=0), dim=0), x)
