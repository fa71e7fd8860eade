"""The interface of every update: a trainable map of the frozen linear map.

    U1:  update(x, base) == x @ update.merge(W0).T     for base(x) = x @ W0.T       (activation space == weight space)
    U2:  update.merge(W0) == W0                         at construction              (training starts at the base model)

Both are asserted for every registered class by ``tests/contracts/test_update_contract.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qaft.bases.base import Matmul
from qaft.updates.entries import EntryChoice
from qaft.updates.shared_input import SharedInput

_DIFFERENCE = 2.0**-8
"""Step of a numerical derivative: the error of the second order and that of fp32 rounding are both about 1e-5."""


@dataclass(frozen=True)
class LowRankFactors:
    """``dW = up @ down``: what a plain LoRA checkpoint can hold. ``down`` is [R, I], ``up`` is [O, R]."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class ChannelChanges:
    """``W = diag(1 + outputs) W0 diag(1 + inputs)``; None for no change. The parameters themselves, [O] and [I]."""

    inputs: Tensor | None = None
    outputs: Tensor | None = None


@runtime_checkable
class FusesProbe(Protocol):
    """An update that adds a zeroth-order probe to its output inside a product that it computes anyway."""

    def forward_probed(
        self, x: Tensor, base: Matmul, directions: Sequence[Mapping[str, Tensor]], steps: Tensor
    ) -> Tensor:
        """Return ``forward(x, base) + sum_g steps_g tangent(x, base, directions[g])``, without a gradient.

        Args:
            x: [..., I].
            base: ``x -> x @ W0.T``; what it returns is overwritten.
            directions: G of them, all of the same parameters.
            steps: [..., G], broadcast over the axes of x but its last.
        """
        ...


class Update(nn.Module, ABC):
    """A trainable change of one linear layer; only its own parameters are trainable.

    Parameters and persistent buffers are its whole state: ``load_state_dict`` into an update that was built from other
    scores gives the same function. Nothing else may be derived from scores, because a checkpoint replaces the choice.

    A subclass is final, takes a ``LinearSpec`` first and its options keyword-only, and raises ``ValueError`` naming the
    layer, the value given and the values allowed.

    Attributes:
        formula: the updated weight.
        source: where the method is from.
        typical: options with which ``qaft list`` counts trainables, where the defaults train nothing.
        shared: names of the parameters that tied updates have in common; see ``is_tied``.
        needs_all_readers: whether tied updates are right only where all layers that read the norm have one.
    """

    formula: ClassVar[str]
    source: ClassVar[str]
    typical: ClassVar[Mapping[str, object]] = MappingProxyType({})
    shared: ClassVar[tuple[str, ...]] = ()
    needs_all_readers: ClassVar[bool] = False

    @cached_property
    def of_input(self) -> SharedInput:
        """Computes once, for all tied updates, what each of them needs of the input."""
        return SharedInput()

    @classmethod
    def has_low_rank(cls) -> bool:
        """Return whether the change of the weight is a product of two thin factors, which a LoRA file can hold."""
        return cls.low_rank_factors is not Update.low_rank_factors

    @classmethod
    def wants_scores(cls, **options: object) -> bool:
        """Return True when these options need a calibration pass before construction."""
        return False

    @classmethod
    def entry_choice(cls, **options: object) -> EntryChoice | None:
        """Return which entries a selection pass has to find for these options, or None.

        Raises:
            ValueError: an option has no such value.
        """
        return None

    @classmethod
    def is_tied(cls, **options: object) -> bool:
        """Return whether, with these options, layers that read the same norm share parameters or what they compute."""
        return False

    def tie_to(self, first: Update) -> None:
        """Share with ``first``, an update of the same kind and options that reads the same norm."""
        for name in self.shared:
            setattr(self, name, getattr(first, name))
        self.of_input = first.of_input.join()

    @abstractmethod
    def forward(self, x: Tensor, base: Matmul) -> Tensor:
        """Return the updated layer's output without bias, [..., I] -> [..., O]; ``base`` is ``x -> x @ W0.T``."""

    @abstractmethod
    def merge(self, weight: Tensor) -> Tensor:
        """Return the updated weight, [O, I] -> [O, I]: a new tensor in ``weight``'s dtype, differentiable in theta."""

    def tangent(self, x: Tensor, base: Matmul, directions: Mapping[str, Tensor]) -> Tensor:
        """Return the derivative of ``forward(x, base)`` along ``directions``, [..., I] -> [..., O]; linear in x.

        Here a central difference in fp32, for any update; one that knows its derivative says so without multiplying by
        the frozen weight again.

        Args:
            x: [..., I].
            base: ``x -> x @ W0.T``.
            directions: for one or more parameters, by name; of the shape of the parameter.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        ends = []
        for step in (_DIFFERENCE, -_DIFFERENCE):
            moved = {n: p + step * directions[n] for n, p in self.named_parameters() if n in directions}
            ends.append(functional_call(self, moved, (wide, base)))
        return ((ends[0] - ends[1]) / (2 * _DIFFERENCE)).to(x.dtype)

    def low_rank_factors(self) -> LowRankFactors | None:
        """Return the exact factors of ``dW`` when its rank is bounded by construction, else None."""
        return None

    def channel_changes(self) -> ChannelChanges | None:
        """Return the scalings that are all of this update, else None."""
        return None

    def touched_rows(self) -> Tensor | None:
        """Return the only rows of the weight that can change, int64 [r] ascending, or None when every row can."""
        return None

    def num_trainable(self) -> int:
        """Return the number of trainable scalars."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)
