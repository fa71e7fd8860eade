"""A row of the table: two choices that exclude each other, or that are known to go wrong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qaft.recipe import Recipe


@dataclass(frozen=True)
class Rule:
    """One row: when it applies, why it does not work, what to do instead."""

    name: str
    applies: Callable[[Recipe], bool]
    reason: str
    instead: str
