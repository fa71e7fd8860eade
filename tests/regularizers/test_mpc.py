"""Orthogonality of the factors: values in closed form, and what gradient descent makes of them."""

from __future__ import annotations

import pytest
import torch
from tiny_regularized import Model
from torch.optim import SGD

from qaft.layers.attach import adapted_layers
from qaft.regularizers.mpc import MPC


def prepared(model: Model, **options) -> MPC:
    term = MPC(**options)
    term.prepare(adapted_layers(model))
    return term


def factors(model: Model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.update.down, layer.update.up) for layer in adapted_layers(model).values()]


@pytest.mark.parametrize("variant", ["o", "d"])
def test_orthonormal_factors_cost_nothing_and_lengths_of_up_cost_in_o_only(variant: str) -> None:
    model = Model(dtype=torch.float64)
    for down, up in factors(model):
        down.data = torch.linalg.qr(torch.randn(16, 8, dtype=torch.float64))[0].T
        up.data = torch.linalg.qr(torch.randn(16, 8, dtype=torch.float64))[0]
    term = prepared(model, variant=variant)
    assert float(term({}).detach()) < 1e-13
    for _, up in factors(model):
        up.data *= 3
    # ||9 I - I|| = 8 sqrt(8) for every up, 0 for every down
    expected = 0.01 * 8 * 8**0.5 / 2 if variant == "o" else 0.0
    assert float(term({}).detach()) == pytest.approx(expected, abs=1e-13)


def test_descent_on_o_drives_every_singular_value_to_1() -> None:
    model = Model(dtype=torch.float64)
    term, parameters = prepared(model, variant="o", weight=1.0), [p for pair in factors(model) for p in pair]
    optimizer = SGD(parameters, lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        term({}).backward()
        optimizer.step()
    for parameter in parameters:
        values = torch.linalg.svdvals(parameter.detach())
        torch.testing.assert_close(values, torch.ones_like(values), atol=0.05, rtol=0)


@pytest.mark.parametrize("variant", ["o", "d"])
def test_an_up_of_zeros_has_no_gradient(variant: str) -> None:
    model = Model(trained=False)
    prepared(model, variant=variant)({}).backward()
    for down, up in factors(model):
        assert bool(down.grad.any())
        assert up.grad.isfinite().all()
        assert not up.grad.any()


def test_updates_without_two_factors_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.proj has a SSB.*lowrank or linchain"):
        prepared(Model("ssb"))


@pytest.mark.parametrize("options", [{"weight": 0}, {"variant": "n"}])
def test_impossible_options_are_refused(options) -> None:
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=rf"^{name}=.* must be"):
        MPC(**options)
