"""The randomized Hadamard rotation, as Kronecker factors: O(n (a + b + ..)) per vector instead of n^2.

    R = diag(signs) H / sqrt(n)        H = H_a (x) H_b (x) ..

The signs come before H: a vector that happens to lie along a row of H is spread like any other, which signs after H
would not do.

Source: RoSTE, arXiv 2502.09003, equation 19 (for column vectors); QuaRot, arXiv 2404.00456.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qaft.rotation.base import Rotation
from qaft.rotation.orders import hadamard_factor, hadamard_factors


class Hadamard(Rotation):
    """``x -> x R`` with R = diag(signs) H / sqrt(n); nothing is trained or saved, (size, seed) defines it.

    fp64 and fp32 are computed as they are; 16-bit inputs in fp32, rounded once at the end.

    Args:
        size: n; ``hadamard_matrix`` says which widths exist.
        seed: of the random signs, which are the same on every device; None for no signs.

    Raises:
        ModelError: there is no Hadamard matrix of this width.
    """

    def __init__(self, size: int, *, seed: int | None = None) -> None:
        super().__init__()
        self.size = size
        self.seed = seed
        self.orders = hadamard_factors(size)
        # int8: exact for +-1, and module.to(dtype) leaves integers alone.
        self.register_buffer("signs", _random_signs(size, seed), persistent=False)
        for position, order in enumerate(self.orders):
            self.register_buffer(f"factor{position}", hadamard_factor(order), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x R``, [..., n] -> [..., n].

        Raises:
            ValueError: the last axis is not ``size``, or x holds integers.
        """
        wide = self._widen(x)
        return self._multiply(wide * self._scaled_signs(wide), transpose=False).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """Return ``x R^T``, [..., n] -> [..., n].

        Raises:
            ValueError: the last axis is not ``size``, or x holds integers.
        """
        wide = self._widen(x)
        return (self._multiply(wide, transpose=True) * self._scaled_signs(wide)).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the size, its factors and the seed."""
        return f"{self.size}, factors={self.orders}, seed={self.seed}"

    def _widen(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.size,):
            raise ValueError(f"x {list(x.shape)}: the last axis must be {self.size}")
        if not x.is_floating_point():
            raise ValueError(f"x is {x.dtype}: a rotation needs floating point")
        return x if x.dtype in (torch.float32, torch.float64) else x.float()

    def _multiply(self, x: Tensor, *, transpose: bool) -> Tensor:
        """Return ``x H`` or ``x H^T`` in the dtype of x."""
        y = x.reshape(-1, self.size)
        # autocast would run the products in 16 bits, several roundings instead of one.
        with torch.autocast(x.device.type, enabled=False):
            for position in reversed(range(len(self.orders))):
                factor = self._cast(f"factor{position}", x)
                # Contract the last axis and move it to the front; after all factors the axes are in order again.
                y = y.unflatten(-1, (-1, self.orders[position])) @ (factor.T if transpose else factor)
                y = y.transpose(-1, -2).flatten(-2)
        return y.reshape(x.shape)

    def _scaled_signs(self, like: Tensor) -> Tensor:
        # One factor for diag(signs) / sqrt(n): one pass over x less.
        return self._cast("signs", like) * self.size**-0.5

    def _cast(self, buffer: str, like: Tensor) -> Tensor:
        return self.get_buffer(buffer).to(device=like.device, dtype=like.dtype)


def _random_signs(size: int, seed: int | None) -> Tensor:
    if seed is None:
        return torch.ones(size, dtype=torch.int8)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return (2 * torch.randint(2, (size,), generator=generator, device="cpu") - 1).to(torch.int8)
