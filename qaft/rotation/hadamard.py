"""The randomized Hadamard rotation, as Kronecker factors: O(n (a + b + ..)) per vector instead of n^2.

    R = diag(signs) H / sqrt(n)        H = H_a (x) H_b (x) ..

The signs come before H: a vector that happens to lie along a row of H is spread like any other, which signs after H
would not do. Factors that are powers of two are not multiplied but transformed (see ``sylvester.py``), except in fp64.

Source: RoSTE, arXiv 2502.09003, equation 19 (for column vectors); QuaRot, arXiv 2404.00456.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qaft.rotation.base import Rotation
from qaft.rotation.orders import hadamard_factor, hadamard_factors
from qaft.rotation.signs import along, random_signs
from qaft.rotation.sylvester import is_sylvester, sylvester


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
        self.register_buffer("signs", random_signs(size, seed), persistent=False)
        for position, order in enumerate(self.orders):
            self.register_buffer(f"factor{position}", hadamard_factor(order), persistent=False)

    def forward(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """Return ``x R`` along ``dim``, in the shape of x.

        Raises:
            ValueError: the axis is not of length ``size``, or x holds integers.
        """
        if self._is_one_transform(x):
            self._check(x, dim)
            return sylvester(x, dim=dim, scale=self.size**-0.5)
        wide = self._widen(x, dim)
        return self._multiply(wide * self._scaled_signs(wide, dim), dim, transpose=False).to(x.dtype)

    def inverse(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """Return ``x R^T`` along ``dim``, in the shape of x.

        Raises:
            ValueError: the axis is not of length ``size``, or x holds integers.
        """
        if self._is_one_transform(x):
            return self.forward(x, dim=dim)
        wide = self._widen(x, dim)
        return (self._multiply(wide, dim, transpose=True) * self._scaled_signs(wide, dim)).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the size, its factors and the seed."""
        return f"{self.size}, factors={self.orders}, seed={self.seed}"

    def _is_one_transform(self, x: Tensor) -> bool:
        """Return whether x is rotated in one pass, without signs: what is done online, to activations."""
        return self.seed is None and is_sylvester(self.size) and x.is_floating_point() and x.dtype != torch.float64

    def _check(self, x: Tensor, dim: int) -> None:
        self.require_axis(x, dim)
        if not x.is_floating_point():
            raise ValueError(f"x is {x.dtype}: a rotation needs floating point")

    def _widen(self, x: Tensor, dim: int) -> Tensor:
        self._check(x, dim)
        return x if x.dtype in (torch.float32, torch.float64) else x.float()

    def _multiply(self, x: Tensor, dim: int, *, transpose: bool) -> Tensor:
        """Return ``x H`` or ``x H^T`` along ``dim`` in the dtype of x.

        Each factor acts on its own axis, from the left, so that nothing is transposed in memory; only a last axis of
        the whole tensor is multiplied from the right.
        """
        if is_sylvester(self.size) and x.dtype == torch.float32:
            return sylvester(x, dim=dim)
        after = math.prod(x.shape[dim % x.dim() + 1 :])  # elements that follow the axis
        y, rest = x, self.size
        # autocast would run the products in 16 bits, several roundings instead of one.
        with torch.autocast(x.device.type, enabled=False):
            for position, order in enumerate(self.orders):
                rest //= order
                y = y.reshape(-1, order, rest * after)
                if is_sylvester(order) and x.dtype == torch.float32:
                    y = sylvester(y, dim=1)
                    continue
                factor = self._cast(f"factor{position}", x)
                factor = factor.T if transpose else factor
                y = y.squeeze(-1) @ factor if rest * after == 1 else torch.matmul(factor.T, y)
        return y.reshape(x.shape)

    def _scaled_signs(self, like: Tensor, dim: int) -> Tensor:
        # One factor for diag(signs) / sqrt(n): one pass over x less.
        return along(self.get_buffer("signs"), like, dim) * self.size**-0.5

    def _cast(self, buffer: str, like: Tensor) -> Tensor:
        return self.get_buffer(buffer).to(device=like.device, dtype=like.dtype)
