from __future__ import annotations

import pytest
import torch

from qaft.rotation.goethals_seidel import SEQUENCES, goethals_seidel


@pytest.mark.parametrize("t", sorted(SEQUENCES))
def test_the_sequences_have_autocorrelations_that_cancel(t: int) -> None:
    rows = torch.tensor([[1 if sign == "+" else -1 for sign in row] for row in SEQUENCES[t]])
    assert rows.shape == (4, t)
    sums = [int((rows * rows.roll(shift, 1)).sum()) for shift in range(t)]
    assert sums == [4 * t] + [0] * (t - 1)


@pytest.mark.parametrize("t", sorted(SEQUENCES))
def test_the_array_is_hadamard(t: int) -> None:
    matrix = goethals_seidel(4 * t).long()
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, 4 * t * torch.eye(4 * t, dtype=torch.long))


@pytest.mark.parametrize("order", [90, 91, 260])
def test_an_order_without_stored_sequences_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"order={order} must be 4t"):
        goethals_seidel(order)
