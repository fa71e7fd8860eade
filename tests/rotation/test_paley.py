from __future__ import annotations

import pytest
import torch

from qaft.rotation.paley import is_paley_one, is_paley_two, paley_one, paley_two


@pytest.mark.parametrize("order", [4, 12, 20, 28, 44, 84, 108, 140, 244, 344])
def test_the_first_construction_is_hadamard_and_skew(order: int) -> None:
    matrix = paley_one(order).long()
    identity = torch.eye(order, dtype=torch.long)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * identity)
    assert torch.equal(matrix + matrix.T, 2 * identity)


@pytest.mark.parametrize("order", [12, 20, 28, 36, 52, 76, 100, 148, 164, 252])
def test_the_second_construction_is_hadamard_and_symmetric(order: int) -> None:
    matrix = paley_two(order).long()
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.long))
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("order", [2, 10, 16, 36, 92])
def test_the_first_construction_refuses_other_orders(order: int) -> None:
    assert not is_paley_one(order)
    with pytest.raises(ValueError, match=f"order={order} must be q \\+ 1"):
        paley_one(order)


@pytest.mark.parametrize("order", [2, 4, 10, 16, 44, 92])
def test_the_second_construction_refuses_other_orders(order: int) -> None:
    assert not is_paley_two(order)
    with pytest.raises(ValueError, match=f"order={order} must be 2 \\(q \\+ 1\\)"):
        paley_two(order)
