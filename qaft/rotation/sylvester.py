"""The product with Sylvester's Hadamard matrix by butterflies: log2(n) stages of additions, in fp32.

    stage h = 1, 2, 4, .. n / 2:    (x_i, x_{i + h})  ->  (x_i + x_{i + h}, x_i - x_{i + h})    where i has no bit h

The stages and their order are the definition. Every sum is one IEEE addition, so the C++ kernel of CPUs, the Triton
kernel of GPUs and the reference here return the same bits, which no matrix product does: its sums have no order.

The matrix is symmetric: the gradient goes through the same transform.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from qaft.native.build import address, library
from qaft.native.gpu import on_triton

_KERNEL_SIZES = range(16, (1 << 15) + 1)
"""Sizes of the kernels: from one register to what fits their buffer."""


def is_sylvester(size: int) -> bool:
    """Return whether ``size`` is a power of two."""
    return size > 0 and size & (size - 1) == 0


def sylvester(x: Tensor, *, dim: int = -1, scale: float = 1.0) -> Tensor:
    """Return ``scale * (x H)`` along ``dim``, in the shape and dtype of x; sums in fp32, rounded once.

    Args:
        x: fp32 or 16 bits; the axis is of a power of two.
        dim: the axis.
        scale: rounded to fp32.
    """
    return _Sylvester.apply(x, dim % x.dim(), scale)  # pyright: ignore[reportReturnType]


class _Sylvester(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, scale: float) -> Tensor:
        ctx.dim, ctx.scale = dim, scale
        return _transform(x.detach(), dim, scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _transform(grad_outputs[0], ctx.dim, ctx.scale), None, None


def _transform(x: Tensor, dim: int, scale: float) -> Tensor:
    size, inner = x.shape[dim], math.prod(x.shape[dim + 1 :])
    if x.device.type == "cpu" and x.numel() and size in _KERNEL_SIZES:
        kernels = library("hadamard")
        if kernels is not None:
            return _rows(kernels, x, size, scale) if inner == 1 else _columns(kernels, x, size, inner, scale)
    if inner == 1 and x.numel() and on_triton(x):
        from qaft.rotation.triton_sylvester import MAX_SIZE, sylvester_rows

        if 1 < size <= MAX_SIZE:
            return sylvester_rows(x.reshape(-1, size), scale=scale).view(x.shape)
    return reference(x, dim=dim, scale=scale)


def reference(x: Tensor, *, dim: int = -1, scale: float = 1.0) -> Tensor:
    """Return what ``sylvester`` does, in torch, on any device; without gradient formula of its own."""
    dim %= x.dim()
    size, inner = x.shape[dim], math.prod(x.shape[dim + 1 :])
    y = x.float().reshape(-1, size * inner)
    half = 1
    while half < size:
        first, second = y.unflatten(-1, (-1, 2, half * inner)).unbind(-2)
        y = torch.stack([first + second, first - second], -2).flatten(1)
        half *= 2
    return (y * scale).view(x.shape).to(x.dtype)


def _rows(kernels: ctypes.CDLL, x: Tensor, size: int, scale: float) -> Tensor:
    wide = x.contiguous() if x.dtype in (torch.float32, torch.bfloat16) else x.float().contiguous()
    y = torch.empty_like(wide)
    kernel = kernels.hadamard_rows_bf16 if wide.dtype == torch.bfloat16 else kernels.hadamard_rows_fp32
    sizes = ctypes.c_long(x.numel() // size), ctypes.c_long(size)
    kernel(address(wide), address(y), *sizes, ctypes.c_float(scale), torch.get_num_threads())
    return y.to(x.dtype)


def _columns(kernels: ctypes.CDLL, x: Tensor, size: int, inner: int, scale: float) -> Tensor:
    y = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    sizes = (ctypes.c_long(number) for number in (x.numel() // (size * inner), size, inner))
    kernels.hadamard_columns_fp32(address(y), *sizes, torch.get_num_threads())
    return (y if scale == 1.0 else y.mul_(scale)).to(x.dtype)
