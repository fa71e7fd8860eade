from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qaft.rotation.errors import crest_factor, linear_errors, output_energy, vector_error
from qaft.rotation.hadamard import Hadamard


def _round(x: Tensor) -> Tensor:
    return x.round()


@pytest.fixture
def data(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = 2 * torch.randn(40, 12, dtype=torch.float64, generator=generator)
    return x, 3 * torch.randn(7, 12, dtype=torch.float64, generator=generator)


def test_every_error_is_its_definition(data: tuple[Tensor, Tensor]) -> None:
    x, weight = data
    errors = linear_errors(x, weight, weights=_round, inputs=_round)
    e, d = weight.round() - weight, x.round() - x
    g = x.round().T @ x.round() / len(x)
    energy = (x @ weight.T).square().sum() / len(x)
    assert errors.delta_w == pytest.approx(float(e.square().sum() / weight.square().sum()))
    assert errors.delta_x == pytest.approx(float((d.square().sum(1) / x.square().sum(1)).mean()))
    assert errors.delta_g == pytest.approx(float(torch.trace(e @ g @ e.T) / energy))
    difference = x.round() @ weight.round().T - x @ weight.T
    assert errors.delta_y == pytest.approx(float(difference.square().sum() / len(x) / energy))
    assert errors.top_token == pytest.approx(float(d.square().sum(1).max() / d.square().sum()))


def test_without_quantizers_there_is_no_error(data: tuple[Tensor, Tensor]) -> None:
    errors = linear_errors(*data, weights=None, inputs=None)
    assert (errors.delta_w, errors.delta_x, errors.delta_g, errors.delta_y) == (0, 0, 0, 0)


def test_errors_of_the_weight_alone_are_delta_g_and_delta_y_at_once(data: tuple[Tensor, Tensor]) -> None:
    errors = linear_errors(*data, weights=_round, inputs=None)
    assert errors.delta_g == pytest.approx(errors.delta_y)
    assert errors.delta_x == 0


def test_another_energy_scales_the_errors_of_the_output_only(data: tuple[Tensor, Tensor]) -> None:
    x, weight = data
    errors = linear_errors(x, weight, weights=_round, inputs=None)
    halved = linear_errors(x, weight, weights=_round, inputs=None, energy=2 * output_energy(x, weight))
    assert halved.delta_y == pytest.approx(errors.delta_y / 2)
    assert halved.delta_w == errors.delta_w


def test_zeros_have_no_error() -> None:
    errors = linear_errors(torch.zeros(3, 4), torch.zeros(2, 4), weights=_round, inputs=_round)
    assert errors.delta_y == errors.delta_x == errors.crest_x == errors.top_token == 0


def test_the_crest_of_an_outlier_is_the_root_of_the_width_and_of_its_rotation_one() -> None:
    x = torch.zeros(1, 4096)
    x[0, 7] = 5
    assert crest_factor(x) == pytest.approx(64)
    assert crest_factor(Hadamard(4096, seed=0)(x)) == pytest.approx(1)


def test_the_crest_of_gaussian_vectors_is_that_of_theory(generator: torch.Generator) -> None:
    assert crest_factor(torch.randn(200, 4096, generator=generator)) == pytest.approx(3.77, abs=0.1)


def test_a_vector_error_is_relative(generator: torch.Generator) -> None:
    x = torch.randn(5, 8, generator=generator)
    assert vector_error(x, lambda v: 0.9 * v) == pytest.approx(0.01)
