"""What belongs to a weight, when the weight moves from one rotated basis to another.

    T = old^T new on the axis that moves;   a weight or its gradient: X -> X T;   a second moment: v -> v (T o T)

The first is exact. The second is the second moment of the turned gradient if its elements are independent, which is
what Adam's diagonal assumes of them anyway; it keeps v positive, and its sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qaft.rotation.base import Rotation
from qaft.rotation.place import Place, Side


def turn(x: Tensor, old: Place, new: Place) -> Tensor:
    """Return a matrix [out, in] of the basis of ``old`` in that of ``new``, in the dtype of x; computed in fp64."""
    turned = x.double()
    for before, after, dim in _moves(old, new):
        turned = turned if before is None else before.undo(turned, dim=dim)
        turned = turned if after is None else after.apply(turned, dim=dim)
    return turned.to(x.dtype)


def turn_second_moment(v: Tensor, old: Place, new: Place) -> Tensor:
    """Return the second moments [out, in] of what ``turn`` turns, in the dtype of v; computed in fp64."""
    turned = v.double()
    for before, after, dim in _moves(old, new):
        turned = turned if before is None else _squared(before).undo(turned, dim=dim)
        turned = turned if after is None else _squared(after).apply(turned, dim=dim)
    return turned.to(v.dtype)


def _moves(old: Place, new: Place) -> list[tuple[Side | None, Side | None, int]]:
    """Return the axes on which a rotation comes or goes, with what is there before and after."""
    pairs = ((old.reads, new.reads, -1), (old.writes, new.writes, 0))
    return [(before, after, dim) for before, after, dim in pairs if (before is None) != (after is None)]


def _squared(side: Side) -> Side:
    return Side(_Squared(side.rotation), side.blocks, side.turned)


class _Squared(Rotation):
    """``x -> x (R o R)``, whose transpose stands for the inverse; no rotation, but it has the axes of one."""

    def __init__(self, rotation: Rotation) -> None:
        super().__init__()
        self.size = rotation.size
        self._matrix = rotation(torch.eye(rotation.size, dtype=torch.float64)).square()

    def forward(self, x: Tensor, *, dim: int = -1) -> Tensor:
        return self._along(x, self._matrix.to(x.device), dim)

    def inverse(self, x: Tensor, *, dim: int = -1) -> Tensor:
        return self._along(x, self._matrix.T.to(x.device), dim)

    def _along(self, x: Tensor, matrix: Tensor, dim: int) -> Tensor:
        self.require_axis(x, dim)
        return (x.movedim(dim, -1) @ matrix).movedim(-1, dim).contiguous()
