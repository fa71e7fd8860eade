"""The quadratic character of a finite field GF(p^k), which Paley's Hadamard matrices are made of.

An element of GF(p^k) is a polynomial over GF(p) modulo an irreducible one, written as the number sum_j c_j p^j of its
coefficients, so that elements are 0 .. q-1 and the prime fields are ordinary arithmetic modulo p.

Shapes: Q = q = p^k elements, K = k coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prime_power(q: int) -> tuple[int, int] | None:
    """Return ``(p, k)`` with ``q = p^k`` and p prime, or None when q is no prime power."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


def quadratic_character(q: int) -> Tensor:
    """Return chi(a - b) for all elements a, b of GF(q), int8 [Q, Q]: 0 for a = b, 1 for squares, -1 for the others.

    Raises:
        ValueError: q is not a power of an odd prime.
    """
    power = prime_power(q)
    if power is None or power[0] == 2:
        raise ValueError(f"q={q} must be a power of an odd prime")
    p, k = power
    place = p ** torch.arange(k)  # value of each coefficient in an element's number
    digits = torch.arange(q).unsqueeze(1) // place % p  # [Q, K]
    chi = torch.full((q,), -1, dtype=torch.int8)
    chi[_square(digits, _irreducible(p, k), p) @ place] = 1
    chi[0] = 0
    difference = (digits.unsqueeze(1) - digits.unsqueeze(0)) % p
    return chi[difference @ place]


def _square(digits: Tensor, modulus: Tensor, p: int) -> Tensor:
    """Return the squares of polynomials [Q, K] modulo a monic ``modulus`` [K + 1] and p, [Q, K]."""
    k = digits.shape[1]
    product = _multiply(digits, digits, p)
    for degree in range(2 * k - 2, k - 1, -1):
        product[:, degree - k : degree + 1] -= product[:, degree : degree + 1] * modulus
        product %= p
    return product[:, :k]


def _multiply(a: Tensor, b: Tensor, p: int) -> Tensor:
    """Return the products of polynomials over GF(p), [N, A] x [N, B] -> [N, A + B - 1], lowest coefficient first."""
    product = torch.zeros(a.shape[0], a.shape[1] + b.shape[1] - 1, dtype=torch.long)
    for shift in range(a.shape[1]):
        product[:, shift : shift + b.shape[1]] += a[:, shift : shift + 1] * b
    return product % p


def _irreducible(p: int, k: int) -> Tensor:
    """Return the first monic polynomial of degree k over GF(p) that is no product of smaller ones, [K + 1]."""
    reducible = torch.zeros(p**k, dtype=torch.bool)
    for degree in range(1, k // 2 + 1):
        left, right = _monic(p, degree), _monic(p, k - degree)
        products = _multiply(left.repeat_interleave(len(right), 0), right.repeat(len(left), 1), p)
        reducible[products[:, :k] @ p ** torch.arange(k)] = True
    first = int((~reducible).nonzero()[0])
    return _monic(p, k)[first]


def _monic(p: int, degree: int) -> Tensor:
    """Return all monic polynomials of a degree over GF(p), ordered by number, [p^degree, degree + 1]."""
    low = torch.arange(p**degree).unsqueeze(1) // p ** torch.arange(degree) % p
    return torch.cat([low, torch.ones(p**degree, 1, dtype=torch.long)], dim=1)
