"""Random signs, the rotation that costs nothing: what a product with diag(+-1) folds into the weights before it."""

from __future__ import annotations

import torch
from torch import Tensor

from qaft.rotation.base import Rotation


class Signs(Rotation):
    """``x -> x diag(signs)``; (size, seed) defines it.

    Args:
        size: n.
        seed: of the signs, which are the same on every device; those of ``Hadamard(size, seed)``.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        super().__init__()
        self.size = size
        self.seed = seed
        self.register_buffer("signs", random_signs(size, seed), persistent=False)

    def forward(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """Return ``x diag(signs)`` along ``dim``, in the shape of x.

        Raises:
            ValueError: the axis is not of length ``size``.
        """
        self.require_axis(x, dim)
        return x * along(self.get_buffer("signs"), x, dim)

    def inverse(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """Return ``x diag(signs)``, which is its own inverse."""
        return self.forward(x, dim=dim)

    def extra_repr(self) -> str:
        """Return the size and the seed."""
        return f"{self.size}, seed={self.seed}"


def random_signs(size: int, seed: int | None) -> Tensor:
    """Return +-1, int8 [size]; ones when there is no seed. int8: exact, and ``module.to(dtype)`` leaves it alone."""
    if seed is None:
        return torch.ones(size, dtype=torch.int8)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return (2 * torch.randint(2, (size,), generator=generator, device="cpu") - 1).to(torch.int8)


def along(vector: Tensor, like: Tensor, dim: int) -> Tensor:
    """Return ``vector`` [n] in the dtype of ``like`` and on its device, shaped to multiply its axis ``dim``."""
    return vector.to(device=like.device, dtype=like.dtype).view(-1, *(1 for _ in like.shape[dim % like.dim() + 1 :]))
