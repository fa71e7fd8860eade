"""Whole tensors out of the parts that DeepSpeed's ZeRO optimizers keep on each rank, and back into parts.

An optimizer steps flat fp32 tensors, one or more for each parameter group; a rank's flat tensor holds pieces of many
parameters one after another, and the optimizer's state has the same layout. A parameter may lie on one rank, on
several, or on all of them in equal parts of which the last is padded.

DeepSpeed has functions for this (``deepspeed.utils.safe_get_full_optimizer_state`` and others), but in 0.19 those of
stages 1 and 2 see the state of the first parameter group only, and the setter of stage 3 fails on a padded part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class _Piece:
    """``flat[at : at + size]`` on this rank is ``whole.flatten()[start : start + size]``."""

    at: int
    start: int
    size: int


class Partitions:
    """The flat fp32 tensors of this rank, and the parameters that lie in them.

    Args:
        zero: the ZeRO optimizer of an engine.
        stage: 1, 2 or 3.
        groups: parameters by group, in the order of the optimizer that was given to the engine.
        shapes: of whole parameters, by ``id``; at stage 3 a parameter itself has none.
        device: where ranks exchange tensors.
    """

    def __init__(
        self,
        zero: Any,
        stage: int,
        groups: Sequence[Sequence[nn.Parameter]],
        shapes: dict[int, torch.Size],
        device: torch.device,
    ) -> None:
        self._zero = zero
        self._stage = stage
        self._groups = groups
        self._shapes = shapes
        self._device = device

    def __iter__(self) -> Iterator[tuple[Tensor, Sequence[nn.Parameter]]]:
        """Yield each flat tensor with its parameters, of which some may lie on other ranks."""
        if self._stage == 3:
            yield from zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups, strict=True)
        else:
            yield from zip(self._zero.single_partition_of_fp32_groups, self._groups, strict=True)

    def gather(self, flat: Tensor, param: nn.Parameter) -> Tensor:
        """Return the whole tensor of ``param``, equal on all ranks; collective.

        Args:
            flat: in the layout of a flat tensor of this object, on any device.
            param: one of its parameters.
        """
        shape = self._shapes[id(param)]
        whole = torch.zeros(shape.numel(), dtype=flat.dtype, device=self._device)
        if piece := self._piece(param):
            whole[piece.start : piece.start + piece.size] = flat[piece.at : piece.at + piece.size].to(self._device)
        # Every element lies on one rank and is zero on the others.
        dist.all_reduce(whole)
        return whole.view(shape)

    def scatter(self, whole: Tensor, flat: Tensor, param: nn.Parameter) -> None:
        """Write this rank's part of ``whole`` into ``flat``."""
        if piece := self._piece(param):
            part = whole.flatten()[piece.start : piece.start + piece.size]
            flat.data[piece.at : piece.at + piece.size].copy_(part)

    def _piece(self, param: Any) -> _Piece | None:
        if self._stage < 3:
            mapping = param._hp_mapping
            if mapping is None:
                return None
            inside = mapping.lp_fragment_address
            return _Piece(mapping.hp_fragment_address.start, inside.start, inside.numel)
        _, at, padded = self._zero.grad_position[self._zero.get_param_id(param)]
        start = padded * dist.get_rank()
        size = min(padded, self._shapes[id(param)].numel() - start)
        return _Piece(at, start, size) if size > 0 else None
