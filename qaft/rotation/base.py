"""An orthogonal map of the last axis.

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
    def forward(self, x: Tensor) -> Tensor:
        """Return ``x R``, [..., n] -> [..., n].

        Raises:
            ValueError: the last axis is not ``size``.
        """

    @abstractmethod
    def inverse(self, x: Tensor) -> Tensor:
        """Return ``x R^T``, [..., n] -> [..., n]."""
