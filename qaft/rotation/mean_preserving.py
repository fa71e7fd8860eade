"""A random rotation that leaves the mean of a vector where it is, for models with LayerNorm.

    R = B diag(signs) B^T,    B an orthonormal Hadamard matrix whose first column is constant,  signs[0] = 1

The constant vector is the eigenvector of the first sign, so ``R 1 = 1``: mean(x R) = mean(x), and a LayerNorm without
weight and bias commutes with R as an RMSNorm does with every rotation. R is symmetric and its own inverse. Its entries
are a Hadamard transform of random signs, about normal with variance 1 / n, where those of a Hadamard matrix are all
``+-1 / sqrt(n)``: a single outlier becomes a Gaussian vector instead of a flat one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qaft.rotation.base import Rotation
from qaft.rotation.hadamard import Hadamard
from qaft.rotation.signs import along, random_signs


class MeanPreserving(Rotation):
    """``x -> x R`` with ``R 1 = 1``; nothing is trained or saved, (size, seed) defines it.

    Args:
        size: n; ``hadamard_matrix`` says which widths exist.
        seed: of the signs, which are the same on every device.

    Raises:
        ModelError: there is no Hadamard matrix of this width.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        super().__init__()
        self.size = size
        self.seed = seed
        self.basis = Hadamard(size)
        # Signs before H that turn its first column into ones: H^T e_0 is that column.
        first = self.basis.inverse(torch.eye(1, size, dtype=torch.float64))[0]
        self.basis.signs = first.sign().to(torch.int8)
        signs = random_signs(size, seed)
        signs[0] = 1
        self.register_buffer("signs", signs, persistent=False)

    def forward(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """Return ``x R`` along ``dim``, in the shape of x.

        Raises:
            ValueError: the axis is not of length ``size``, or x holds integers.
        """
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        spectrum = self.basis(wide, dim=dim)
        return self.basis.inverse(spectrum * along(self.get_buffer("signs"), wide, dim), dim=dim).to(x.dtype)

    def inverse(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """Return ``x R^T``, which is ``x R``."""
        return self.forward(x, dim=dim)

    def extra_repr(self) -> str:
        """Return the size and the seed."""
        return f"{self.size}, seed={self.seed}"
