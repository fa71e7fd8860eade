"""The interface of every update: a trainable map of the frozen linear map.

    U1:  update(x, base) == x @ update.merge(W0).T     for base(x) = x @ W0.T       (activation space == weight space)
    U2:  update.merge(W0) == W0                         at construction              (training starts at the base model)

Both are asserted for every registered class by ``tests/contracts/test_update_contract.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from qaft.bases.base import Matmul


@dataclass(frozen=True)
class LowRankFactors:
    """``dW = up @ down``: what a plain LoRA checkpoint can hold. ``down`` is [R, I], ``up`` is [O, R]."""

    down: Tensor
    up: Tensor


class Update(nn.Module, ABC):
    """A trainable change of one linear layer; only its own parameters are trainable.

    A subclass is final, takes a ``LinearSpec`` first and its options keyword-only, and raises ``ValueError`` naming the
    layer, the value given and the values allowed.
    """

    @classmethod
    def wants_scores(cls, **options: object) -> bool:
        """Return True when these options need a calibration pass before construction."""
        return False

    @abstractmethod
    def forward(self, x: Tensor, base: Matmul) -> Tensor:
        """Return the updated layer's output without bias, [..., I] -> [..., O]; ``base`` is ``x -> x @ W0.T``."""

    @abstractmethod
    def merge(self, weight: Tensor) -> Tensor:
        """Return the updated weight, [O, I] -> [O, I]: a new tensor in ``weight``'s dtype, differentiable in theta."""

    def low_rank_factors(self) -> LowRankFactors | None:
        """Return the exact factors of ``dW`` when its rank is bounded by construction, else None."""
        return None

    def num_trainable(self) -> int:
        """Return the number of trainable scalars."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)
