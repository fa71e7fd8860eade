"""Reverse-mode differentiation: the loss is its own surrogate."""

from __future__ import annotations

from typing import Any

from qaft.gradients.base import Closure, GradientEstimate, Parameters


class Backprop:
    """The exact gradient, through the straight-through estimator where layers are fake-quantized."""

    needs_backward = True

    def __call__(self, closure: Closure, params: Parameters) -> GradientEstimate:
        """Evaluate the closure once; its gradient is the estimate."""
        loss = closure()
        return GradientEstimate(surrogate=loss, loss=loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dictionary: back-propagation has no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept the empty state."""
