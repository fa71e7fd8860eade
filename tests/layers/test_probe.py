"""The side path against perturbed parameters, layer by layer in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from qaft.bases.base import LinearSpec
from qaft.bases.dense import DenseBase
from qaft.errors import ModelError
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.probe import probed, row_shares
from qaft.quant.affine import Affine
from qaft.updates import UPDATES

OUT, IN, ROWS, TOKENS, EPS = 24, 64, 6, 5, 2.0**-6
KINDS = {
    "bank": {"rank": 2, "blocks": 3},
    "dense": {},
    "roco": {"rows": 3, "columns": 2},
    "lowrank": {"rank": 3},
}
SECOND_DEGREE = {"lowrank"}


def layer_of(kind: str, dtype: torch.dtype = torch.float64, **options) -> AdaptedLinear:
    generator = torch.Generator().manual_seed(0)
    update = UPDATES[kind](LinearSpec(name="q_proj", out_features=OUT, in_features=IN, dtype=dtype), **KINDS[kind])
    for p in update.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=dtype)
    return AdaptedLinear(DenseBase(torch.randn(OUT, IN, generator=generator, dtype=dtype)), update, **options)


def directions_of(layer: AdaptedLinear, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            f"q_proj.update.{n}": torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for n, p in layer.update.named_parameters()
        }
        for _ in range(count)
    ]


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(ROWS, TOKENS, IN, generator=torch.Generator().manual_seed(2), dtype=dtype)


def moved(layer: AdaptedLinear, x: Tensor, direction: dict[str, Tensor], step: float) -> Tensor:
    values = {
        n.removeprefix("q_proj."): dict(layer.named_parameters())[n.removeprefix("q_proj.")] + step * d
        for n, d in direction.items()
    }
    return functional_call(layer, values, (x,))


@torch.no_grad()
@pytest.mark.parametrize("flat", [False, True], ids=["rows", "tokens"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_both_signs_in_one_batch_equal_moved_parameters(kind: str, count: int, flat: bool) -> None:
    layer, x = layer_of(kind), inputs()
    directions = directions_of(layer, count)
    both = torch.cat([x, x])
    with probed({"q_proj": layer}, directions, EPS, rows=ROWS):
        found = layer(both.flatten(0, 1) if flat else both).view(2 * ROWS, TOKENS, OUT)
    plus, minus = found.split(ROWS)
    for direction, share in zip(directions, row_shares(ROWS, count), strict=True):
        rows = slice(share.start, share.stop)
        there, back = (moved(layer, x[rows], direction, sign * EPS) for sign in (1, -1))
        # Of an update of the second degree the sum of both signs has a term more, their difference has not.
        torch.testing.assert_close(plus[rows] - minus[rows], there - back, rtol=0, atol=1e-12)
        if kind not in SECOND_DEGREE:
            torch.testing.assert_close(plus[rows], there, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_quantized_layer_is_probed_beside_its_quantizer() -> None:
    layer, x = layer_of("bank", torch.float32, quantizer=Affine(bits=4, group_size=32)), inputs(torch.float32)
    [direction] = directions_of(layer, 1)
    plain = layer(x)
    with probed({"q_proj": layer}, [direction], EPS, rows=ROWS):
        found = layer(torch.cat([x, x]))
    change = layer.update.tangent(
        x, layer.base.matmul, {n.removeprefix("q_proj.update."): d for n, d in direction.items()}
    )
    torch.testing.assert_close(found[:ROWS], plain + EPS * change, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[ROWS:], plain - EPS * change, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_two_signs_are_mirrored_exactly() -> None:
    layer, x = layer_of("bank"), inputs()
    [direction] = directions_of(layer, 1)
    with probed({"q_proj": layer}, [direction], EPS, rows=ROWS):
        there = layer(torch.cat([x, x]))
    with probed({"q_proj": layer}, [{n: -d for n, d in direction.items()}], EPS, rows=ROWS):
        back = layer(torch.cat([x, x]))
    assert torch.equal(there[:ROWS], back[ROWS:])
    assert torch.equal(there[ROWS:], back[:ROWS])


@torch.no_grad()
def test_nothing_is_left_behind() -> None:
    layer, x = layer_of("bank"), inputs()
    before, values = layer(x), {n: p.clone() for n, p in layer.state_dict().items()}
    with probed({"q_proj": layer}, directions_of(layer, 1), EPS, rows=ROWS):
        layer(torch.cat([x, x]))
    assert torch.equal(layer(x), before)
    assert all(torch.equal(p, values[n]) for n, p in layer.state_dict().items())


@torch.no_grad()
def test_an_untrained_bank_is_the_base_to_the_last_bit() -> None:
    weight = torch.randn(OUT, IN).bfloat16()
    update = UPDATES["bank"](LinearSpec(name="q_proj", out_features=OUT, in_features=IN))
    x = inputs(torch.float32).bfloat16()
    assert torch.equal(AdaptedLinear(DenseBase(weight), update)(x), F.linear(x, weight))


@torch.no_grad()
def test_a_layer_that_sees_other_rows_than_the_batch_is_refused() -> None:
    layer, x = layer_of("bank"), inputs()
    with (
        pytest.raises(ModelError, match="q_proj: it sees 5 rows of a batch of 2 x 6"),
        probed({"q_proj": layer}, directions_of(layer, 1), EPS, rows=ROWS),
    ):
        layer(x[:5])


@torch.no_grad()
def test_layers_without_a_direction_are_left_alone() -> None:
    layer, other, twice = layer_of("bank"), layer_of("bank"), torch.cat([inputs(), inputs()])
    expected = other(twice)
    with probed({"q_proj": layer, "v_proj": other}, directions_of(layer, 1), EPS, rows=ROWS):
        assert torch.equal(other(twice), expected)


@pytest.mark.parametrize(("rows", "count"), [(6, 4), (3, 5), (8, 1)])
def test_shares_cover_the_rows_once_and_differ_by_one_at_most(rows: int, count: int) -> None:
    shares = row_shares(rows, count)
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"q_proj: rank=25 must be in \[1, 24\]"):
        UPDATES["bank"](LinearSpec(name="q_proj", out_features=OUT, in_features=IN), rank=25)


def test_the_first_blocks_of_a_bank_do_not_depend_on_its_size() -> None:
    spec = LinearSpec(name="q_proj", out_features=OUT, in_features=IN)
    small, large = (UPDATES["bank"](spec, rank=2, blocks=blocks) for blocks in (2, 5))
    assert torch.equal(small.basis(torch.float32), large.basis(torch.float32, slice(0, 4)))
    other = UPDATES["bank"](LinearSpec(name="v_proj", out_features=OUT, in_features=IN), rank=2, blocks=2)
    assert not torch.equal(small.basis(torch.float32), other.basis(torch.float32))


def test_a_bank_holds_one_bit_for_each_sign() -> None:
    update = UPDATES["bank"](LinearSpec(name="q_proj", out_features=OUT, in_features=IN), rank=2, blocks=32)
    assert sum(b.nbytes for b in update.buffers()) == 64 * IN // 8
    assert isinstance(update, nn.Module) and update.num_trainable() == 64 * OUT
