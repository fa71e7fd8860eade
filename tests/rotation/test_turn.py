"""Matrices and second moments that move from one basis to another."""

from __future__ import annotations

import pytest
import torch

from qaft.rotation.hadamard import Hadamard
from qaft.rotation.place import Place, Side
from qaft.rotation.signs import Signs
from qaft.rotation.turn import turn, turn_second_moment

STREAM = Side(Hadamard(8, seed=3))
HEADS = Side(Hadamard(4, seed=1), 3, range(1, 3))
PAIRS = {
    "rows": (Place(reads=STREAM), Place(reads=STREAM, writes=HEADS)),
    "columns": (Place(), Place(reads=Side(Hadamard(4, seed=2), 2))),
    "signs": (Place(reads=STREAM), Place(reads=STREAM, writes=Side(Signs(4, seed=5), 3))),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_turning_equals_leaving_one_basis_and_entering_the_other(
    pair: tuple[Place, Place], generator: torch.Generator
) -> None:
    old, new = pair
    original = torch.randn(12, 8, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(turn(old.fuse(original, None), old, new), new.fuse(original, None), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_a_second_moment_is_that_of_independent_elements(pair: tuple[Place, Place], generator: torch.Generator) -> None:
    old, new = pair
    variance = torch.rand(12, 8, dtype=torch.float64, generator=generator)
    # E[turn(g)^2] for independent g: every element of g contributes its variance times its squared weight.
    expected = torch.zeros_like(variance)
    for o in range(12):
        for i in range(8):
            unit = torch.zeros_like(variance)
            unit[o, i] = 1
            expected += variance[o, i] * turn(unit, old, new).square()
    found = turn_second_moment(variance, old, new)
    torch.testing.assert_close(found, expected)
    assert bool((found > 0).all())


def test_what_stays_is_not_touched(generator: torch.Generator) -> None:
    x = torch.randn(12, 8, generator=generator)
    place = Place(reads=STREAM, writes=HEADS)
    assert torch.equal(turn(x, place, place), x)
    assert torch.equal(turn_second_moment(x, place, place), x)
