"""Where gradients come from.

    G1:  a source returns a scalar whose gradient is the estimate.
         Backprop: the loss itself. A two-point method: c * sum(u * (p @ v)), whose gradient in p is exactly c u v^T.

So every engine and optimizer sees one thing: a scalar to back-propagate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

Closure = Callable[[], Tensor]
"""``() -> scalar loss``; equal parameters give an equal value (noise is reseeded inside)."""


class GradientEstimate(NamedTuple):
    """``surrogate`` is back-propagated (law G1); ``loss`` is detached, for logs."""

    surrogate: Tensor
    loss: Tensor


class GradientSource(Protocol):
    """Turns a loss closure into a surrogate; leaves the parameters as it found them."""

    needs_backward: bool
    """Whether the closure must build an autograd graph (activations are kept)."""

    def __call__(self, closure: Closure, params: Sequence[nn.Parameter]) -> GradientEstimate:
        """Evaluate ``closure`` as often as needed and return the estimate."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue with the same estimates (JSON-able or tensors)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``."""
        ...
