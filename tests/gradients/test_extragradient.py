"""The extragradient against its closed form on a quadratic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toy_closure import ToyClosure

from qaft.gradients.backprop import Backprop
from qaft.gradients.extragradient import Extragradient

ROOT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HESSIAN = ROOT @ ROOT.T
START = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


def quadratic() -> ToyClosure:
    params = {"w": nn.Parameter(START.clone()), "unused": nn.Parameter(torch.ones(2, dtype=torch.float64))}
    return ToyClosure(params, lambda values: 0.5 * (values["w"] @ HESSIAN @ values["w"]).reshape(1))


def gradient(source: Backprop | Extragradient, closure: ToyClosure) -> Tensor:
    source(closure, closure.params).surrogate.backward()
    found = closure.params["w"].grad
    assert found is not None
    return found


def test_a_step_on_a_quadratic_is_the_second_order_polynomial_of_its_hessian() -> None:
    eta, rate, eye = 0.05, 0.03, torch.eye(4, dtype=torch.float64)
    closure = quadratic()
    found = START - eta * gradient(Extragradient(rate=rate), closure)
    torch.testing.assert_close(found, (eye - eta * HESSIAN + eta * rate * HESSIAN @ HESSIAN) @ START)


def test_no_extrapolation_is_the_plain_gradient_bit_for_bit() -> None:
    assert torch.equal(gradient(Extragradient(rate=0.0), quadratic()), gradient(Backprop(), quadratic()))


def test_parameters_are_left_bit_for_bit_and_the_loss_is_theirs() -> None:
    closure = quadratic()
    estimate = Extragradient(rate=0.3)(closure, closure.params)
    assert torch.equal(closure.params["w"].detach(), START)
    assert torch.equal(estimate.loss, closure().detach())


def test_parameters_are_left_when_the_second_pass_fails() -> None:
    closure, losses = quadratic(), quadratic().losses
    calls = []

    def failing(values):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return losses(values)

    closure.losses = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        Extragradient()(closure, closure.params)
    assert torch.equal(closure.params["w"].detach(), START)


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="rate=-1 must be at least 0"):
        Extragradient(rate=-1)
