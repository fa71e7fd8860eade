"""Adam's direction as a relative change of each parameter, with an additive part that lets zeros and signs change.

    u_t     = m_t / (1 - beta1^t) / (sqrt(v_t / (1 - beta2^t)) + eps)               Adam's direction
    theta  <- theta - eta (|theta| tanh(k u_t) + a u_t)                             k = inner, a = additive

With a = 0 (the multiplicative rule) no step changes a parameter by more than eta |theta|, none changes its sign, and 0
stays 0. With a > 0 (the hybrid rule) it is Adam with rate a eta plus that.

Source: multiplicative update rules, arXiv 2307.07189, for the multiplicative term; the paper's hybrid adds an update in
the ordinary form, here with the same direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class MultiplicativeAdam(Optimizer):
    """The rule above; the step of an element depends on that element alone.

    Args:
        groups: torch parameter groups with ``lr`` (eta).
        betas: of m and v.
        eps: of the direction.
        inner: k; large values step by the sign of the direction.
        additive: a; 0 for the pure rule.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        inner: float = 1.0,
        additive: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        options = {"betas": betas, "eps": eps, "inner": inner, "additive": additive, "weight_decay": weight_decay}
        super().__init__(groups, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _step(parameter, parameter.grad, self.state[parameter], group)


def _step(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    (beta1, beta2), step = group["betas"], float(state["step"])
    mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
    square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
    # The bias of the second moment under the root, so that eps means what it means in AdamW.
    direction = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
    change = parameter.abs() * torch.tanh(group["inner"] * direction) + group["additive"] * direction
    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])
