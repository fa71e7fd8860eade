"""The pull towards the base model as a step of its own, decoupled from the optimizer's moments.

    theta <- theta - eta lambda (theta - theta_0)            before each step; eta is the group's learning rate

That is decoupled weight decay (AdamW's) wherever theta_0 = 0: on deltas, scalings, and LoRA's B. Selective: only where
the pull does not work against the loss, for each tensor by itself:

    <dL/dtheta, theta - theta_0> >= 0

Source: Linearization Explains Fine-Tuning (arXiv 2602.08239): its proximal objective lambda / 2 ||theta - theta_0||^2,
and its equation 8 for the selective rule.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from qaft.layers.adapted import AdaptedLinear
from qaft.regularizers.base import StepRule


class Proximal(StepRule):
    """Decoupled pull towards where the parameters started; ``selective`` only while the gradient points away.

    Args:
        weight: lambda.
        selective: pull a tensor only when its gradient's step would move it back already.

    Raises:
        ValueError: weight is not above 0.
    """

    def __init__(self, *, weight: float = 0.1, selective: bool = True) -> None:
        if not weight > 0:
            raise ValueError(f"weight={weight} must be above 0; leave the regularizer out for none")
        self.weight, self.selective = weight, selective
        self._starts: dict[int, Tensor] = {}

    @torch.no_grad()
    def prepare(self, layers: Mapping[str, AdaptedLinear]) -> None:
        """Keep a copy of every parameter that does not start at 0 (LoRA's A)."""
        parameters = [p for layer in layers.values() for p in layer.update.parameters()]
        self._starts = {id(p): p.detach().clone() for p in parameters if bool(p.any())}

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Pull every parameter that has a gradient."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._pull(parameter, group["lr"])

    def _pull(self, parameter: Tensor, rate: float) -> None:
        start = self._starts.get(id(parameter))
        distance = parameter if start is None else parameter - start.to(parameter.device)
        if self.selective:
            assert parameter.grad is not None
            away = (parameter.grad.flatten().float() @ distance.flatten().float()) >= 0
            # As a factor: a branch would wait for the device in every step.
            parameter.sub_(distance * (rate * self.weight * away))
        else:
            parameter.sub_(distance, alpha=rate * self.weight)
