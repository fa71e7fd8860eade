"""The multiplicative rule and its hybrid against their closed forms on a quadratic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qaft.train.multiplicative import MultiplicativeAdam

SPREAD = torch.linspace(-2, 2, 16, dtype=torch.float64)


def stepped(start: Tensor, steps: int = 1, **options: float) -> Tensor:
    """Steps on ``0.5 |theta|^2``, whose gradient is theta."""
    parameter = nn.Parameter(start.clone())
    optimizer = MultiplicativeAdam([{"params": [parameter], "lr": 0.1}], **options)  # pyright: ignore[reportArgumentType]
    for _ in range(steps):
        parameter.grad = parameter.detach().clone()
        optimizer.step()
    return parameter.detach()


def test_the_first_step_on_a_quadratic_is_a_fixed_share_of_every_parameter() -> None:
    # Adam's first direction is the sign: theta - eta |theta| tanh(k) sign(theta) = (1 - eta tanh k) theta.
    torch.testing.assert_close(stepped(SPREAD, inner=0.7), (1 - 0.1 * math.tanh(0.7)) * SPREAD)


def test_the_first_hybrid_step_adds_adams() -> None:
    expected = (1 - 0.1 * math.tanh(0.7)) * SPREAD - 0.1 * 0.3 * SPREAD.sign()
    torch.testing.assert_close(stepped(SPREAD, inner=0.7, additive=0.3), expected)


def test_steps_follow_the_recursion() -> None:
    beta1, beta2, eps, k, a, decay, theta = 0.8, 0.95, 1e-6, 2.0, 0.3, 0.2, SPREAD.clone()
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t in range(1, 6):
        m, v = beta1 * m + (1 - beta1) * theta, beta2 * v + (1 - beta2) * theta**2
        u = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
        theta = theta - 0.1 * (theta.abs() * torch.tanh(k * u) + a * u) - 0.1 * decay * theta
    options = {"betas": (beta1, beta2), "eps": eps, "inner": k, "additive": a, "weight_decay": decay}
    torch.testing.assert_close(stepped(SPREAD, steps=5, **options), theta)  # pyright: ignore[reportArgumentType]


def test_the_hybrid_of_a_vanishing_gain_is_adamw() -> None:
    parameter = nn.Parameter(SPREAD.clone())
    reference = torch.optim.AdamW([parameter], lr=0.1 * 0.5, weight_decay=0.0)
    for _ in range(5):
        parameter.grad = parameter.detach().clone()
        reference.step()
    torch.testing.assert_close(stepped(SPREAD, steps=5, inner=1e-12, additive=0.5), parameter.detach())


@pytest.mark.parametrize("inner", [0.5, 100.0])
def test_no_step_of_the_pure_rule_changes_a_parameter_by_more_than_its_share_or_its_sign(inner: float) -> None:
    theta = SPREAD
    for _ in range(20):
        moved = stepped(theta, inner=inner)
        assert bool(((moved - theta).abs() <= 0.1 * theta.abs() + 1e-15).all())
        assert torch.equal(moved.sign(), theta.sign())
        theta = moved


def test_zero_is_a_fixed_point_of_the_pure_rule_and_of_no_hybrid() -> None:
    for additive, is_fixed in ((0.0, True), (0.5, False)):
        parameter = nn.Parameter(torch.zeros(3))
        optimizer = MultiplicativeAdam([{"params": [parameter], "lr": 0.1}], additive=additive)
        for _ in range(4):
            parameter.grad = torch.tensor([1.0, -2.0, 3.0])
            optimizer.step()
        assert torch.equal(parameter.detach(), torch.zeros(3)) == is_fixed
