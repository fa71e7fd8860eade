"""Hadamard matrices of order 4t from four sequences of length t, for orders that Paley's families leave out.

    H = [[  A,     B R,    C R,    D R  ],
         [ -B R,   A,      D'R,   -C'R  ],
         [ -C R,  -D'R,    A,      B'R  ],
         [ -D R,   C'R,   -B'R,    A    ]]

A .. D are circulant with A A' + B B' + C C' + D D' = 4t I (their periodic autocorrelations add up to zero), R reverses
the order of the columns, ' transposes. Up to t = 43 the sequences below are constant on the orbits of a multiplier
group modulo t, which makes an exhaustive search short; from there on they were found by collecting pairs with small
autocorrelations and matching them.

Source: J. M. Goethals and J. J. Seidel, Canad. J. Math. 19 (1967).
"""

from __future__ import annotations

import torch
from torch import Tensor

SEQUENCES: dict[int, tuple[str, str, str, str]] = {
    23: (
        "+++-++--+-+--+-+--++-++",
        "++++--+-+-++++-+-+--+++",
        "++-++--+++----+++--++-+",
        "+-+++-----+--+-----+++-",
    ),
    29: (
        "++-+--+++--+------+--+++--+-+",
        "+++++---+-+-++--++-+-+---++++",
        "+--+-+++-+++-++++-+++-+++-+--",
        "++----+++-++-+--+-++-+++----+",
    ),
    39: (
        "+-+--+-++--++------+++--+---+-+++++-++-",
        "++--+-+++-++--+++++-++++++---+---+++-++",
        "+-+-++----+--+---+-+-+-++++-+--+++----+",
        "+++-++----+---+-++-+-+++++--++-+++-+--+",
    ),
    43: (
        "+-+----+++---+++-++---+--++++++-+-+-+--+--+",
        "+++-+-+-+-++----+----++++--+---++--+--+++++",
        "+-++-+--++--++++-+-++-+--+-+----++--++-+--+",
        "+------+-+---+++-++------++-+++---+-+------",
    ),
    47: (
        "++---++++-+--+-+++-++++-++-+-+++-+++-+-----+--+",
        "---++++-+-+++-+++++++----+-++---++-+++-++--+--+",
        "+-+-++-+-+---+++-+--+---+++++++-+++-+-+++--++-+",
        "-+++----++----++-++++-----+-++--+++-++-+++-+-++",
    ),
    59: (
        "+-++-++--++-++-++-+-++-+++++--+-+-+++------+++--++--+-+-+++",
        "+-+-++++--+--++----+++----++-+-+++--++------++-+++++++++-+-",
        "-++--+-++--++++-++++++----+++++--+-+-+++--++-+-+-++--+--+-+",
        "-++++++-++++++-+-+---+-++-+++------+++--+++-++-+--+-+---++-",
    ),
}
"""t -> the first rows of A, B, C and D."""


def is_goethals_seidel(order: int) -> bool:
    """Return whether sequences for this order are stored."""
    return order % 4 == 0 and order // 4 in SEQUENCES


def goethals_seidel(order: int) -> Tensor:
    """Return a Hadamard matrix of order 4t, int8 [order, order].

    Raises:
        ValueError: no sequences of length ``order / 4`` are stored.
    """
    if not is_goethals_seidel(order):
        raise ValueError(f"order={order} must be 4t with t in {', '.join(map(str, SEQUENCES))}")
    a, b, c, d = (_circulant(signs) for signs in SEQUENCES[order // 4])
    # Reversed columns: M.flip(1) = M R.
    br, cr, dr = (m.flip(1) for m in (b, c, d))
    btr, ctr, dtr = (m.T.flip(1) for m in (b, c, d))
    rows = ((a, br, cr, dr), (-br, a, dtr, -ctr), (-cr, -dtr, a, btr), (-dr, ctr, -btr, a))
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def _circulant(signs: str) -> Tensor:
    """Return the matrix whose row i is ``signs`` shifted right by i, int8 [t, t]."""
    row = torch.tensor([1 if sign == "+" else -1 for sign in signs], dtype=torch.int8)
    index = torch.arange(len(row))
    return row[(index.unsqueeze(0) - index.unsqueeze(1)) % len(row)]
