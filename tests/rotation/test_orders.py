from __future__ import annotations

import math

import pytest
import torch

from qaft.errors import ModelError
from qaft.rotation.orders import MAX_FACTOR, hadamard_factor, hadamard_factors, hadamard_matrix

BUILDABLE = [1, 2, *range(4, 257, 4), 344, 500, 924]

MODEL_WIDTHS = [
    *(576, 768, 896, 960, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 6656, 7168, 8192),
    *(8960, 9728, 10944, 11008, 13824, 14336, 17408, 18944, 25600, 27648, 28672, 29568),
]


@pytest.mark.parametrize("n", BUILDABLE)
def test_the_matrix_has_signs_as_entries_and_orthogonal_rows(n: int) -> None:
    matrix = hadamard_matrix(n)
    assert matrix.dtype == torch.float64
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 16, 256, 512])
def test_a_power_of_two_gives_sylvesters_matrix(n: int) -> None:
    index = torch.arange(n)
    overlap = index.unsqueeze(1) & index
    parity = sum((overlap >> bit & 1) for bit in range(n.bit_length())) % 2
    assert torch.equal(hadamard_matrix(n), (1 - 2 * parity).double())


@pytest.mark.parametrize("n", MODEL_WIDTHS)
def test_every_width_of_a_real_model_is_a_product_of_small_hadamard_matrices(n: int) -> None:
    factors = hadamard_factors(n)
    assert math.prod(factors) == n
    assert max(factors) <= 172
    for order in factors:
        factor = hadamard_factor(order).long()
        assert torch.equal(factor @ factor.T, order * torch.eye(order, dtype=torch.long))


def test_the_matrix_is_the_kronecker_product_of_its_factors() -> None:
    left, right = (hadamard_factor(order).double() for order in hadamard_factors(896))
    product = torch.einsum("ij,kl->ikjl", left, right).reshape(896, 896)
    assert torch.equal(hadamard_matrix(896), product)


@pytest.mark.parametrize("n", [3, 6, 90, 4095])
def test_a_width_that_is_no_multiple_of_four_is_refused_with_its_neighbours(n: int) -> None:
    with pytest.raises(ModelError, match=rf"over {n} elements.*only 1, 2 and multiples of 4") as error:
        hadamard_matrix(n)
    assert "set qat.rotation to none" in str(error.value)


def test_a_width_out_of_reach_is_refused_with_its_neighbours_and_its_largest_block() -> None:
    with pytest.raises(ModelError, match=r"13696.*nearest widths are 13680 and 13728, the largest block .* is 128"):
        hadamard_factors(13696)


def test_a_prime_power_above_the_largest_factor_is_not_used() -> None:
    # 2011 is prime and 3 modulo 4, so Paley's matrix exists, but 2012 = 4 * 503 has no small factors.
    assert MAX_FACTOR < 2012
    with pytest.raises(ModelError, match="2012"):
        hadamard_factors(2012)


@pytest.mark.parametrize("n", [0, -4])
def test_a_width_below_one_is_refused(n: int) -> None:
    with pytest.raises(ModelError, match="the width must be at least 1"):
        hadamard_factors(n)
