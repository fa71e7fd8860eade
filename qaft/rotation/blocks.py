"""One small rotation, repeated along a wide axis: I (x) R."""

from __future__ import annotations

from torch import Tensor

from qaft.rotation.base import Rotation


class BlockDiagonal(Rotation):
    """``x -> x (I (x) R)``: every block of ``block.size`` elements is rotated by itself.

    Args:
        size: n, a multiple of the block's.
        block: R.

    Raises:
        ValueError: the size is no multiple of the block's.
    """

    def __init__(self, size: int, block: Rotation) -> None:
        super().__init__()
        if size % block.size:
            raise ValueError(f"size={size} must be a multiple of the block's {block.size}")
        self.size = size
        self.block = block

    def forward(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """Return ``x (I (x) R)`` along ``dim``, in the shape of x.

        Raises:
            ValueError: the axis is not of length ``size``, or x holds integers.
        """
        self.require_axis(x, dim)
        dim %= x.dim()
        return self.block(x.unflatten(dim, (-1, self.block.size)), dim=dim + 1).view(x.shape)

    def inverse(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """Return ``x (I (x) R^T)`` along ``dim``, in the shape of x."""
        self.require_axis(x, dim)
        dim %= x.dim()
        return self.block.inverse(x.unflatten(dim, (-1, self.block.size)), dim=dim + 1).view(x.shape)
