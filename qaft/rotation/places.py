"""Where each weight of a model meets the rotated spaces, as a table: module name -> Place.

R1 [hidden, hidden] turns the residual stream, R2 [head_dim, head_dim] the value heads of one layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qaft.arch.base import Arch
from qaft.errors import ModelError
from qaft.rotation import build_rotation
from qaft.rotation.base import Rotation

CHUNK_ELEMENTS = 2**18
"""Elements held in fp64 at once (2 MiB): they stay in a cache, and a large embedding costs no fp64 copy of itself."""


@dataclass(frozen=True)
class Side:
    """One axis of a weight: ``blocks`` copies of a rotation along it."""

    rotation: Rotation
    blocks: int = 1

    @property
    def width(self) -> int:
        """Return the length of the axis."""
        return self.blocks * self.rotation.size

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x (I (x) R)``, [..., width] -> [..., width]."""
        return self.rotation(x.unflatten(-1, (-1, self.rotation.size))).flatten(-2)

    def undo(self, x: Tensor) -> Tensor:
        """Return ``x (I (x) R^T)``, [..., width] -> [..., width]."""
        return self.rotation.inverse(x.unflatten(-1, (-1, self.rotation.size))).flatten(-2)


@dataclass(frozen=True)
class Place:
    """How a weight [out, in] meets the rotated spaces.

    Attributes:
        norm: parameter name of the norm whose weight gamma scales its inputs.
        reads: the rotation of its inputs.
        writes: the rotation of its outputs.
    """

    norm: str | None = None
    reads: Side | None = None
    writes: Side | None = None

    def fuse(self, weight: Tensor, gamma: Tensor | None) -> Tensor:
        """Return ``writes^T W diag(gamma) reads`` in fp32, computed in fp64."""

        def step(part: Tensor) -> Tensor:
            part = part if gamma is None else part * gamma
            part = part if self.reads is None else self.reads.apply(part)
            return part if self.writes is None else self.writes.apply(part.mT).mT

        return self._in_chunks(weight, step)

    def restore(self, weight: Tensor, gamma: Tensor | None) -> Tensor:
        """Return ``writes W reads^T diag(1 / gamma)`` in fp32, computed in fp64."""

        def step(part: Tensor) -> Tensor:
            part = part if self.writes is None else self.writes.undo(part.mT).mT
            part = part if self.reads is None else self.reads.undo(part)
            return part if gamma is None else part / gamma

        return self._in_chunks(weight, step)

    def fuse_bias(self, bias: Tensor) -> Tensor:
        """Return ``b writes`` in fp32, computed in fp64, [out] -> [out]."""
        return (bias.double() if self.writes is None else self.writes.apply(bias.double())).float()

    def restore_bias(self, bias: Tensor) -> Tensor:
        """Return ``b writes^T`` in fp32, computed in fp64, [out] -> [out]."""
        return (bias.double() if self.writes is None else self.writes.undo(bias.double())).float()

    def _in_chunks(self, weight: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
        # A rotation of all outputs mixes the rows: such a weight is cut by columns, every other one by rows.
        axis = 1 if self.writes is not None and self.writes.blocks == 1 else 0
        side = (self.writes, self.reads)[axis]
        block = 1 if side is None else side.rotation.size
        size = block * max(1, CHUNK_ELEMENTS // (block * weight.shape[1 - axis]))
        result = torch.empty_like(weight, dtype=torch.float32)
        for source, target in zip(weight.split(size, axis), result.split(size, axis), strict=True):
            target.copy_(step(source.double()))
        return result


def places_of(arch: Arch, *, rotation: str, seed: int) -> dict[str, Place]:
    """Return module name -> place for every module that the rotation changes; empty for the rotation ``none``.

    R1 and the R2 of each layer get their own seeds, derived from ``seed``.

    Raises:
        ModelError: a width has no such rotation, or the norms cannot be folded.
        RecipeError: the rotation is not known.
    """
    residual = _rotation(rotation, arch.hidden_size, _derive(seed, "residual"), where="hidden_size")
    if residual is None:
        return {}
    if arch.family.norm != "rms":
        raise ModelError(
            f"{arch.family.model_type}: a norm of kind {arch.family.norm!r} cannot be folded, only 'rms'; "
            f"set qat.rotation to none"
        )
    r1 = Side(residual)
    places = {arch.family.embedding: Place(reads=r1)}
    places |= {name: Place(f"{norm}.weight", reads=r1) for norm, linears in arch.readers() for name in linears}
    places |= {name: Place(writes=r1) for name in arch.writers()}
    for layer, (value, output) in enumerate(arch.value_outputs()):
        r2 = _rotation(rotation, arch.head_dim, _derive(seed, f"value.{layer}"), where="head_dim")
        assert r2 is not None
        places[value] = replace(places[value], writes=Side(r2, arch.num_kv_heads))
        places[output] = replace(places[output], reads=Side(r2, arch.num_heads))
    return places


def _rotation(kind: str, size: int, seed: int, *, where: str) -> Rotation | None:
    try:
        return build_rotation(kind, size, seed=seed)
    except ModelError as error:
        raise ModelError(f"{where}={size}: {error}") from error


def _derive(seed: int, purpose: str) -> int:
    # Hashed, so that no two purposes share signs whatever the seeds are; 7 bytes fit every generator.
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big")
