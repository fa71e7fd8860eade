"""The interface of every regularizer: a scalar that is 0 when the trainables are where they started."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn


class Regularizer(ABC):
    """A term added to the task loss."""

    @abstractmethod
    def prepare(self, layers: Mapping[str, nn.Module]) -> None:
        """Take what is needed from the adapted layers, once, before the first step."""

    @abstractmethod
    def __call__(self, layers: Mapping[str, nn.Module]) -> Tensor:
        """Return the scalar term; 0 when theta equals theta_0."""
