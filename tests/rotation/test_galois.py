from __future__ import annotations

import pytest
import torch

from qaft.rotation.galois import prime_power, quadratic_character


@pytest.mark.parametrize(
    ("q", "expected"), [(2, (2, 1)), (3, (3, 1)), (343, (7, 3)), (625, (5, 4)), (97, (97, 1)), (243, (3, 5))]
)
def test_prime_powers_are_taken_apart(q: int, expected: tuple[int, int]) -> None:
    assert prime_power(q) == expected


@pytest.mark.parametrize("q", [-3, 0, 1, 6, 15, 171, 1711])
def test_other_numbers_are_no_prime_powers(q: int) -> None:
    assert prime_power(q) is None


@pytest.mark.parametrize("p", [3, 7, 13, 23])
def test_in_a_prime_field_the_character_is_eulers_criterion(p: int) -> None:
    chi = quadratic_character(p)
    for a in range(p):
        euler = pow(a, (p - 1) // 2, p)
        assert chi[a, 0] == (euler if euler <= 1 else -1)


@pytest.mark.parametrize("q", [9, 25, 27, 49, 81, 125, 243, 343])
def test_the_character_of_an_extension_field_has_jacobsthals_product(q: int) -> None:
    # Q Q^T = q I - J and J Q = 0 hold exactly when chi is the quadratic character of a field.
    matrix = quadratic_character(q).long()
    assert torch.equal(matrix @ matrix.T, q * torch.eye(q, dtype=torch.long) - 1)
    assert not matrix.sum(0).any()


@pytest.mark.parametrize(("q", "sign"), [(27, -1), (343, -1), (25, 1), (81, 1), (13, 1)])
def test_minus_one_is_a_square_exactly_when_q_is_one_modulo_four(q: int, sign: int) -> None:
    matrix = quadratic_character(q)
    assert torch.equal(matrix.T, sign * matrix)


@pytest.mark.parametrize("q", [1, 8, 15])
def test_a_character_needs_a_power_of_an_odd_prime(q: int) -> None:
    with pytest.raises(ValueError, match=f"q={q} must be a power of an odd prime"):
        quadratic_character(q)
