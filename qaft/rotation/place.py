"""How one weight meets the rotated spaces: the norm it reads, the rotation of its inputs, that of its outputs.

With row vectors, y = x W^T, gamma the weight of the norm that it reads and C = I - 1 1^T / n (only before a LayerNorm,
which ignores what C takes away):

    W' = writes^T C W diag(gamma) reads
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qaft.rotation.base import Rotation

CHUNK_ELEMENTS = 2**18
"""Elements computed at once (2 MiB in fp64): they stay in a cache, and an embedding costs no fp64 copy of itself."""


@dataclass(frozen=True)
class Side:
    """One axis of a weight: ``blocks`` copies of a rotation along it.

    Attributes:
        rotation: of each block.
        blocks: how many there are.
        turned: which of them are rotated, None for all (linears that hold more than value heads have others).
    """

    rotation: Rotation
    blocks: int = 1
    turned: range | None = None

    @property
    def width(self) -> int:
        """Return the length of the axis."""
        return self.blocks * self.rotation.size

    def apply(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """Return ``x (I (x) R)`` along ``dim`` (-1 or 0), in the shape of x."""
        return self._each_block(self.rotation.forward, x, dim)

    def undo(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """Return ``x (I (x) R^T)`` along ``dim`` (-1 or 0), in the shape of x."""
        return self._each_block(self.rotation.inverse, x, dim)

    def _each_block(self, turn: Callable[..., Tensor], x: Tensor, dim: int) -> Tensor:
        blocks = x.unflatten(dim, (self.blocks, self.rotation.size))
        inner = -1 if dim == -1 else 1
        if self.turned is None:
            return turn(blocks, dim=inner).view(x.shape)
        part = slice(self.turned.start, self.turned.stop, self.turned.step)
        index = (..., part, slice(None)) if dim == -1 else (part,)
        result = blocks.clone()
        result[index] = turn(blocks[index], dim=inner)
        return result.view(x.shape)


@dataclass(frozen=True)
class Place:
    """How a weight [out, in] meets the rotated spaces.

    Attributes:
        norm: module name of the norm whose weight gamma scales its inputs.
        reads: the rotation of its inputs.
        writes: the rotation of its outputs.
        centers: which axis loses its mean: "reads", "writes" or none.
    """

    norm: str | None = None
    reads: Side | None = None
    writes: Side | None = None
    centers: str | None = None

    def fuse(self, weight: Tensor, gamma: Tensor | None) -> Tensor:
        """Return ``writes^T C W diag(gamma) reads`` in fp32.

        16-bit weights are computed in fp32, far below their own rounding, wider ones in fp64; between the two sides a
        weight is rounded to fp32.
        """

        def read(part: Tensor) -> Tensor:
            part = part if gamma is None else part * gamma.to(part.device, part.dtype)
            part = part - part.mean(-1, keepdim=True) if self.centers == "reads" else part
            return part if self.reads is None else self.reads.apply(part)

        def write(part: Tensor) -> Tensor:
            part = part - part.mean(0, keepdim=True) if self.centers == "writes" else part
            return part if self.writes is None else self.writes.apply(part, dim=0)

        return self._in_chunks(weight, (read, write))

    def restore(self, weight: Tensor, gamma: Tensor | None) -> Tensor:
        """Return ``writes W reads^T diag(1 / gamma)`` in fp32, computed as ``fuse``; what C took away stays away."""

        def read(part: Tensor) -> Tensor:
            part = part if self.reads is None else self.reads.undo(part)
            return part if gamma is None else part / gamma.to(part.device, part.dtype)

        def write(part: Tensor) -> Tensor:
            return part if self.writes is None else self.writes.undo(part, dim=0)

        return self._in_chunks(weight, (read, write))

    def fuse_bias(self, bias: Tensor) -> Tensor:
        """Return ``b C writes`` in fp32, computed in fp64, [out] -> [out]."""
        bias = bias.double()
        bias = bias - bias.mean() if self.centers == "writes" else bias
        return (bias if self.writes is None else self.writes.apply(bias)).float()

    def restore_bias(self, bias: Tensor) -> Tensor:
        """Return ``b writes^T`` in fp32, computed in fp64, [out] -> [out]."""
        return (bias.double() if self.writes is None else self.writes.undo(bias.double())).float()

    def _in_chunks(self, weight: Tensor, steps: tuple[Callable[[Tensor], Tensor], ...]) -> Tensor:
        """Return ``weight`` [O, I] after the step of its rows and then that of its columns, fp32."""
        dtype = torch.float32 if weight.dtype.itemsize == 2 else torch.float64
        result = torch.empty_like(weight, dtype=torch.float32)
        rows, columns = (max(1, CHUNK_ELEMENTS // weight.shape[axis]) for axis in (1, 0))
        for source, target in zip(weight.split(rows), result.split(rows), strict=True):
            target.copy_(steps[0](source.to(dtype)))
        if self.writes is not None or self.centers == "writes":
            for part in result.split(columns, 1):
                part.copy_(steps[1](part.to(dtype)))
        return result
