"""An orthogonal map of one axis, by default the last.

R1:  R R^T = I
R2:  (x R)(W R)^T == x W^T        (the same call rotates activations and the input side of a weight)
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Rotation(nn.Module, ABC):
    """``x -> x R`` for a fixed orthogonal R [n, n]; computes in the dtype of x and keeps its gradient exact.

    Attributes:
        size: n.
    """

    size: int

    @abstractmethod
    def forward(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """Return ``x R`` along ``dim``, in the shape of x; along the rows of a matrix that is ``R^T x``.

        Raises:
            ValueError: the axis is not of length ``size``.
        """

    @abstractmethod
    def inverse(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """Return ``x R^T`` along ``dim``, in the shape of x."""

    def require_axis(self, x: Tensor, dim: int) -> None:
        """Refuse an input that this rotation does not fit.

        Raises:
            ValueError: there is no such axis, or it is not of length ``size``.
        """
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != self.size:
            raise ValueError(f"x {list(x.shape)}: axis {dim} must be of length {self.size}")
