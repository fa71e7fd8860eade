"""Paley's two families of Hadamard matrices.

    I:   H = I + S           S = [[0, 1], [-1, Q]]   order q + 1,     q = 3 mod 4
    II:  H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]
                             C = [[0, 1], [1, Q]]    order 2 (q + 1), q = 1 mod 4

Q[a, b] = chi(a - b) over GF(q), q a power of an odd prime; Q is antisymmetric in the first case, symmetric in the
second.

Source: R. E. A. C. Paley, On Orthogonal Matrices, J. Math. Phys. 12 (1933).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qaft.rotation.galois import prime_power, quadratic_character


def is_paley_one(order: int) -> bool:
    """Return whether Paley's first construction has a matrix of this order."""
    return order % 4 == 0 and prime_power(order - 1) is not None


def is_paley_two(order: int) -> bool:
    """Return whether Paley's second construction has a matrix of this order."""
    q = order // 2 - 1
    return order % 4 == 0 and q % 4 == 1 and prime_power(q) is not None


def paley_one(order: int) -> Tensor:
    """Return a Hadamard matrix of order q + 1, int8 [order, order].

    Raises:
        ValueError: ``order - 1`` is not a prime power that is 3 modulo 4.
    """
    if not is_paley_one(order):
        raise ValueError(f"order={order} must be q + 1 with a prime power q = 3 modulo 4")
    return _bordered(order - 1, sign=-1) + torch.eye(order, dtype=torch.int8)


def paley_two(order: int) -> Tensor:
    """Return a symmetric Hadamard matrix of order 2 (q + 1), int8 [order, order].

    Raises:
        ValueError: ``order / 2 - 1`` is not a prime power that is 1 modulo 4.
    """
    if not is_paley_two(order):
        raise ValueError(f"order={order} must be 2 (q + 1) with a prime power q = 1 modulo 4")
    conference = _bordered(order // 2 - 1, sign=1)
    identity = torch.eye(order // 2, dtype=torch.int8)
    off_diagonal = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, off_diagonal) + torch.kron(identity, diagonal)


def _bordered(q: int, *, sign: int) -> Tensor:
    """Return ``[[0, 1], [sign, Q]]``, the (skew-)symmetric conference matrix of GF(q), int8 [q + 1, q + 1]."""
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    matrix[0, 1:] = 1
    matrix[1:, 0] = sign
    matrix[1:, 1:] = quadratic_character(q)
    return matrix
