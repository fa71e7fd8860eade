"""The gradient where a first step would lead.

    theta_half = theta - rate grad L(theta),    estimate = grad L(theta_half)

With plain SGD of rate eta on a quadratic of Hessian H: theta+ = (I - eta H + eta rate H^2) theta. The first step stays
with the micro-batch of this process, as in local extrapolation. Two forward and backward passes; what is held besides
is one gradient and one copy of the trained parameters.

Source: extrapolation for large-batch training, arXiv 2006.05720.
"""

from __future__ import annotations

from typing import Any

import torch

from qaft.gradients.base import Closure, GradientEstimate, Parameters


class Extragradient:
    """The gradient at an extrapolated point; the loss that is logged is the one at the parameters themselves.

    Args:
        rate: length of the first step per unit of gradient; 0 gives the plain gradient.

    Raises:
        ValueError: rate is negative.
    """

    needs_backward = True

    def __init__(self, *, rate: float = 0.1) -> None:
        if not rate >= 0:
            raise ValueError(f"rate={rate} must be at least 0; 0 is the plain gradient")
        self.rate = rate

    def __call__(self, closure: Closure, params: Parameters) -> GradientEstimate:
        """Evaluate the closure at both points and return the second gradient as a linear surrogate (law G1)."""
        wanted = [parameter for parameter in params.values() if parameter.requires_grad]
        loss = closure()
        first = torch.autograd.grad(loss, wanted, materialize_grads=True)
        start = [parameter.detach().clone() for parameter in wanted]
        try:
            with torch.no_grad():
                for parameter, gradient in zip(wanted, first, strict=True):
                    parameter.sub_(gradient, alpha=self.rate)
            second = torch.autograd.grad(closure(), wanted, materialize_grads=True)
        finally:
            # Copied back: adding the step again would leave rounding behind.
            with torch.no_grad():
                for parameter, value in zip(wanted, start, strict=True):
                    parameter.copy_(value)
        surrogate = torch.stack([(p * g).sum() for p, g in zip(wanted, second, strict=True)]).sum()
        return GradientEstimate(surrogate=surrogate, loss=loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dictionary: both points follow from the parameters."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept the empty state."""
