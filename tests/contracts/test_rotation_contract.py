"""The laws of ``qaft/rotation/base.py``, for every registered rotation and those that stand in for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qaft.errors import RecipeError
from qaft.rotation import ROTATIONS, build_rotation
from qaft.rotation.base import Rotation
from qaft.rotation.blocks import BlockDiagonal
from qaft.rotation.hadamard import Hadamard
from qaft.rotation.mean_preserving import MeanPreserving
from qaft.rotation.signs import Signs

KINDS = [*sorted(kind for kind, cls in ROTATIONS.items() if cls is not None), "blocks", "mean_preserving", "signs"]
UNREGISTERED: dict[str, Callable[[int, int], Rotation]] = {
    "blocks": lambda size, seed: BlockDiagonal(size, Hadamard(size & -size, seed=seed)),
    "mean_preserving": lambda size, seed: MeanPreserving(size, seed=seed),
    "signs": lambda size, seed: Signs(size, seed=seed),
}
SIZES = [1, 2, 12, 48, 100, 128]


def _build(kind: str, size: int) -> Rotation:
    rotation = _seeded(kind, size, 7)
    assert rotation is not None
    return rotation


def _seeded(kind: str, size: int, seed: int) -> Rotation | None:
    return UNREGISTERED[kind](size, seed) if kind in UNREGISTERED else build_rotation(kind, size, seed=seed)


def _dense(rotation: Rotation) -> torch.Tensor:
    return rotation(torch.eye(rotation.size, dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_r1_the_matrix_is_orthogonal_and_inverse_is_its_transpose(kind: str, size: int) -> None:
    rotation = _build(kind, size)
    identity = torch.eye(size, dtype=torch.float64)
    dense = _dense(rotation)
    torch.testing.assert_close(dense @ dense.T, identity, rtol=0, atol=1e-14)
    torch.testing.assert_close(rotation.inverse(identity), dense.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_r2_a_product_is_kept_when_both_sides_are_rotated(kind: str, size: int, generator: torch.Generator) -> None:
    rotation = _build(kind, size)
    x = torch.randn(2, 3, size, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, size, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(rotation(x) @ rotation(weight).T, x @ weight.T)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_dense_matrix(kind: str, direction: str, generator: torch.Generator) -> None:
    rotation = _build(kind, 48)
    dense = _dense(rotation) if direction == "forward" else _dense(rotation).T
    functional = torch.randn(2, 3, 48, dtype=torch.float64, generator=generator)
    x = torch.randn(2, 3, 48, dtype=torch.float64, generator=generator, requires_grad=True)
    (getattr(rotation, direction)(x) * functional).sum().backward()
    torch.testing.assert_close(x.grad, functional @ dense.T)


@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_inputs_are_computed_in_fp32_and_rounded_once(kind: str, generator: torch.Generator) -> None:
    rotation = _build(kind, 576)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(3, 576, generator=generator).to(dtype)
        assert torch.equal(rotation(x), rotation(x.float()).to(dtype))
        assert torch.equal(rotation.inverse(x), rotation.inverse(x.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_round_trip_is_exact_to_the_precision_of_the_input(
    kind: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    rotation = _build(kind, 576)
    x = torch.randn(4, 576, dtype=dtype, generator=generator)
    back = rotation.inverse(rotation(x))
    assert back.dtype == dtype
    assert (back - x).norm() <= 8 * torch.finfo(dtype).eps * x.norm()


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 0, 12), (2, 1, 3, 12)])
@pytest.mark.parametrize("kind", KINDS)
def test_leading_axes_are_free(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> None:
    rotation = _build(kind, 12)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    assert rotation(x).shape == shape
    torch.testing.assert_close(rotation(x), x @ _dense(rotation))


@pytest.mark.parametrize("kind", KINDS)
def test_a_strided_input_gives_the_same_result_and_stays_as_it_is(kind: str, generator: torch.Generator) -> None:
    rotation = _build(kind, 48)
    x = torch.randn(48, 5, generator=generator)
    before = x.clone()
    torch.testing.assert_close(rotation(x.T), rotation(x.T.contiguous()), rtol=0, atol=1e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_along_another_axis_it_is_the_same_map(kind: str, direction: str, generator: torch.Generator) -> None:
    turn = getattr(_build(kind, 48), direction)
    x = torch.randn(3, 48, 5, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(turn(x, dim=1), turn(x.mT).mT)
    torch.testing.assert_close(turn(x, dim=-2), turn(x, dim=1), rtol=0, atol=0)
    torch.testing.assert_close(turn(x[0], dim=0), turn(x, dim=1)[0])


@pytest.mark.parametrize("shape", [(), (11,), (12, 13), (24,)])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_another_width_is_refused(kind: str, direction: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="axis -1 must be of length 12"):
        getattr(_build(kind, 12), direction)(torch.ones(shape))


@pytest.mark.parametrize("kind", KINDS)
def test_kind_size_and_seed_define_it(kind: str) -> None:
    assert torch.equal(_dense(_build(kind, 48)), _dense(_build(kind, 48)))
    other = _seeded(kind, 48, 8)
    assert other is not None and not torch.equal(_dense(_build(kind, 48)), _dense(other))


def test_none_is_no_rotation() -> None:
    assert build_rotation("none", 90) is None


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        RecipeError, match=r"qat\.rotation='hadamrd'.*adaptive, hadamard, none; did you mean 'hadamard'"
    ):
        build_rotation("hadamrd", 48)
