"""Which widths have a Hadamard matrix here, and its Kronecker factors: H_n = H_a (x) H_b (x) ..., n = a b ...

Each factor is Sylvester's (a power of two), Paley's or Goethals and Seidel's. A vector is multiplied factor by factor,
so the factorization with the cheapest product is chosen.
"""

from __future__ import annotations

from functools import cache, reduce

import torch
from torch import Tensor

from qaft.errors import ModelError
from qaft.rotation.goethals_seidel import goethals_seidel, is_goethals_seidel
from qaft.rotation.paley import is_paley_one, is_paley_two, paley_one, paley_two

MAX_FACTOR = 1024
"""Largest factor: beyond it the dense product costs more than the rotation is worth."""

PASS_COST = 128
"""Cost of one more factor (a pass over memory), in multiply-adds per element: 64 (x) 64 beats 16 (x) 16 (x) 16."""


def hadamard_matrix(n: int) -> Tensor:
    """Return a Hadamard matrix: fp64 [n, n] with entries +-1 and ``H H^T = n I``.

    For a power of two it is Sylvester's, H[i, j] = (-1)^popcount(i & j).

    Raises:
        ModelError: no construction reaches n; the message names the nearest widths that can be built.
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    return reduce(torch.kron, (hadamard_factor(order).double() for order in hadamard_factors(n)), one)


def hadamard_factors(n: int) -> tuple[int, ...]:
    """Return the orders of the Kronecker factors of ``hadamard_matrix(n)``, largest first; their product is n.

    Raises:
        ModelError: no construction reaches n; the message names the nearest widths that can be built.
    """
    best = _cheapest(n) if n > 0 else None
    if best is None:
        raise ModelError(_refusal(n))
    return best[1]


def hadamard_factor(order: int) -> Tensor:
    """Return the Hadamard matrix of one factor order, int8 [order, order].

    Raises:
        ValueError: the order is reached only as a product, or not at all.
    """
    if _is_power_of_two(order):
        return _sylvester(order)
    if is_paley_one(order):
        return paley_one(order)
    if is_paley_two(order):
        return paley_two(order)
    return goethals_seidel(order)


def _is_factor(order: int) -> bool:
    known = _is_power_of_two(order) or is_paley_one(order) or is_paley_two(order) or is_goethals_seidel(order)
    return 1 < order <= MAX_FACTOR and known


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.int8)
    pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    while len(matrix) < order:
        matrix = torch.kron(matrix, pair)
    return matrix


@cache
def _cheapest(n: int) -> tuple[int, tuple[int, ...]] | None:
    """Return the least cost per element and its factors (largest first), or None when n cannot be reached."""
    if n == 1:
        return 0, ()
    candidates = []
    for order in _divisors(n):
        rest = _cheapest(n // order) if _is_factor(order) else None
        if rest is not None:
            factors = tuple(sorted((order, *rest[1]), reverse=True))
            candidates.append((rest[0] + order + PASS_COST, factors))
    return min(candidates, default=None)


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _refusal(n: int) -> str:
    if n < 1:
        return f"rotation over {n} elements: the width must be at least 1"
    below = next(m for m in range(n, 0, -1) if _cheapest(m) is not None)
    above = next(m for m in range(n, 2 * n + 8) if _cheapest(m) is not None)
    block = max(d for d in _divisors(n) if _cheapest(d) is not None)
    reason = "only 1, 2 and multiples of 4 have one" if n % 4 else "no construction here reaches it"
    return (
        f"rotation over {n} elements: there is no Hadamard matrix of this width ({reason}); the nearest widths are "
        f"{below} and {above}, the largest block that divides {n} is {block}; set qat.rotation to none"
    )
