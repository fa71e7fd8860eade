"""The proximal pull against decoupled weight decay, its closed form, and the theorem behind the selective rule."""

from __future__ import annotations

import pytest
import torch
from tiny_regularized import Model
from torch.optim import SGD, AdamW, Optimizer

from qaft.layers.attach import adapted_layers
from qaft.regularizers.proximal import Proximal


def pulled(optimizer: Optimizer, rule: Proximal) -> Optimizer:
    optimizer.register_step_pre_hook(lambda stepping, *_: rule.before_step(stepping))
    return optimizer


def test_on_parameters_that_start_at_zero_it_is_adamws_decoupled_decay() -> None:
    rule = Proximal(weight=0.3, selective=False)
    rule.prepare({})
    ours, theirs = (torch.zeros(6, 5, requires_grad=True) for _ in range(2))
    optimizers = pulled(AdamW([ours], lr=0.05, weight_decay=0), rule), AdamW([theirs], lr=0.05, weight_decay=0.3)
    for step in range(6):
        target = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            (parameter - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(ours, theirs)
    assert bool(ours.any())


def test_with_sgd_it_is_the_gradient_of_the_proximal_objective() -> None:
    rule, start = Proximal(weight=0.4, selective=False), torch.randn(5)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    rule._starts = {id(ours): start}
    optimizers = pulled(SGD([ours], lr=0.1), rule), SGD([theirs], lr=0.1)
    for _ in range(4):
        ours.pow(4).sum().backward()
        (theirs.pow(4).sum() + 0.2 * (theirs - start).square().sum()).backward()
        # The pull comes first, from where the gradient was taken: both act on the same parameters.
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(ours, theirs)


def test_loras_first_factor_is_pulled_to_where_it_started_and_not_to_zero() -> None:
    model = Model(trained=False)
    layers = adapted_layers(model)
    update = layers["model.layers.0.proj"].update
    rule = Proximal(weight=1.0, selective=False)
    rule.prepare(layers)
    start = update.down.detach().clone()
    update.down.data += 1
    for parameter in update.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pulled(SGD(list(update.parameters()), lr=0.25), rule).step()
    torch.testing.assert_close(update.down, start + 0.75)
    assert not update.up.any()


@pytest.mark.parametrize(("direction", "expected"), [(1.0, 0.9), (-1.0, 1.0)])
def test_selective_pulls_only_what_the_gradient_moves_back(direction: float, expected: float) -> None:
    rule = Proximal(weight=1.0)
    rule.prepare({})
    parameter = torch.ones(4, requires_grad=True)
    parameter.grad = torch.full((4,), direction)
    optimizer = SGD([parameter], lr=0.1)
    rule.before_step(optimizer)
    torch.testing.assert_close(parameter, torch.full((4,), expected))


def test_the_selective_pull_never_raises_a_convex_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        h, b = root @ root.T, torch.randn(4, generator=generator, dtype=torch.float64)
        theta = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
        before = theta @ h @ theta / 2 - b @ theta
        before.backward()
        small = 1e-3 / float(torch.linalg.eigvalsh(h)[-1])
        rule = Proximal(weight=1.0)
        rule.prepare({})
        curvature = theta.detach() @ h @ theta.detach()
        rule.before_step(SGD([theta], lr=small))
        after = theta.detach() @ h @ theta.detach() / 2 - b @ theta.detach()
        assert float(after - before.detach()) <= float(small**2 * curvature / 2) + 1e-12


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    rule, parameter = Proximal(weight=1.0, selective=False), torch.ones(3, requires_grad=True)
    rule.prepare({})
    rule.before_step(SGD([parameter], lr=0.5))
    assert torch.equal(parameter, torch.ones(3))


def test_a_weight_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="weight=0 must be above 0"):
        Proximal(weight=0)
