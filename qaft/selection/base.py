"""Which layers are adapted: the interface of every selector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class LayerSelector(Protocol):
    """Chooses among the linear layers of a model."""

    def __call__(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the chosen layer names, in the order of ``names``.

        Raises:
            TargetError: nothing is chosen.
        """
        ...
