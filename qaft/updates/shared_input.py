"""What several layers compute from the one tensor that they all read, computed once.

q_proj, k_proj and v_proj are given the same tensor, and so are gate_proj and up_proj: where they also share what they
do to it first, the first of them does it for all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Entry:
    source: weakref.ref[Tensor]
    state: tuple[object, ...]
    result: Tensor
    left: int


class SharedInput:
    """A function of the input that the members of a group call one after another; it starts with one member.

    What is held is let go when the last member has read it, or when the input is gone. An input that is another tensor
    for each member (because each rounds its own) is computed for each.
    """

    def __init__(self) -> None:
        self._members = 1
        self._entry: _Entry | None = None

    def join(self) -> SharedInput:
        """Count one more member, and return this object for it to hold."""
        self._members += 1
        return self

    def __call__(self, x: Tensor, compute: Callable[[Tensor], Tensor], *parameters: Tensor) -> Tensor:
        """Return ``compute(x)``, from the member that has called with this very tensor before where there is one.

        Args:
            x: the input.
            compute: the same for all members.
            parameters: what ``compute`` depends on besides; after a step it is another function.
        """
        state = (torch.is_grad_enabled(), *(_version(tensor) for tensor in (x, *parameters)))
        entry = self._entry
        if entry is not None and entry.source() is x and entry.state == state:
            entry.left -= 1
            if not entry.left:
                self._entry = None
            return entry.result
        result = compute(x)
        if self._members > 1:
            self._entry = _Entry(weakref.ref(x, self._forget), state, result, self._members - 1)
        return result

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        if self._entry is not None and self._entry.source is source:
            self._entry = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the group without what it holds, which no copy of a model needs."""
        return {"_members": self._members, "_entry": None}


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; unknown in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
