from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm

from qaft.rotation.mean_preserving import MeanPreserving

SIZES = [12, 20, 48, 92, 128, 576, 768]


@pytest.mark.parametrize("size", SIZES)
def test_the_mean_stays_where_it_is(size: int, generator: torch.Generator) -> None:
    x = torch.randn(3, size, dtype=torch.float64, generator=generator) + 2
    rotated = MeanPreserving(size, seed=5)(x)
    torch.testing.assert_close(rotated.mean(-1), x.mean(-1), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", SIZES)
def test_a_layer_norm_commutes_with_it(size: int, generator: torch.Generator) -> None:
    rotation = MeanPreserving(size, seed=5)
    x = torch.randn(3, size, dtype=torch.float64, generator=generator) * 3 + 2
    torch.testing.assert_close(layer_norm(rotation(x), (size,)), rotation(layer_norm(x, (size,))))


def test_an_outlier_is_spread_like_gaussian_noise() -> None:
    x = torch.zeros(4096, dtype=torch.float64)
    x[5] = 64.0
    rotated = MeanPreserving(4096, seed=0)(x)
    assert 0.9 < float(rotated.std()) < 1.1
    assert float(rotated.abs().max()) < 5
