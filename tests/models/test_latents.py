"""Latents off their own grid: what counts as on the grid, and that moving off it changes no code."""

from __future__ import annotations

import pytest
import torch

from qaft.errors import ModelError
from qaft.models.latents import ON_GRID, grid_distance, off_grid
from qaft.quant import FP4, MXFP4, NF4, NVFP4, Q4_0, Affine
from qaft.quant.base import Quantizer

GRIDS: dict[str, Quantizer] = {
    "int4 g64": Affine(bits=4, group_size=64, symmetric=True, scale_dtype=torch.bfloat16),
    "int4 asymmetric": Affine(bits=4, group_size=32, symmetric=False, scale_dtype=torch.float32),
    "int8 channel": Affine(bits=8, group_size=None, symmetric=True, scale_dtype=torch.bfloat16),
    "int8 g128": Affine(bits=8, group_size=128, symmetric=True, scale_dtype=torch.bfloat16),
    "nf4": NF4(group_size=64),
    "fp4": FP4(group_size=64),
    "int4 signed": Affine(bits=4, group_size=64, range="signed_absmax", scale_dtype=torch.bfloat16),
    "q4_0": Q4_0(),
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(),
}


@pytest.fixture(params=GRIDS.values(), ids=GRIDS.keys())
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    return request.param


@pytest.fixture
def weight(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(130, 256, generator=generator)


def test_a_random_weight_lies_at_distance_one(
    quantizer: Quantizer, weight: torch.Tensor, generator: torch.Generator
) -> None:
    # A cell at the border of the range is only entered from inside, and normal weights are denser in the middle.
    assert grid_distance(weight, quantizer, generator) == pytest.approx(1, abs=0.1)


def test_a_dequantized_weight_lies_on_the_grid(
    quantizer: Quantizer, weight: torch.Tensor, generator: torch.Generator
) -> None:
    on_grid = quantizer.quantize(weight).dequantize(torch.float32)
    assert grid_distance(on_grid, quantizer, generator) < 1e-5


def test_rounding_to_16_bits_does_not_hide_the_grid(
    quantizer: Quantizer, weight: torch.Tensor, generator: torch.Generator
) -> None:
    rounded = quantizer.quantize(weight).dequantize(torch.bfloat16)
    assert grid_distance(rounded, quantizer, generator) < 0.7 * ON_GRID


def test_a_weight_of_zeros_is_left_alone(quantizer: Quantizer, generator: torch.Generator) -> None:
    zeros = torch.zeros(4, 256)
    latents, moved = off_grid(zeros, quantizer, name="layer", seed=0)
    assert not moved and latents is zeros


def test_a_weight_off_the_grid_is_returned_as_it_is(quantizer: Quantizer, weight: torch.Tensor) -> None:
    latents, moved = off_grid(weight, quantizer, name="layer", seed=0)
    assert latents is weight and not moved


def test_moved_latents_have_the_same_codes_and_feel_small_updates(
    quantizer: Quantizer, weight: torch.Tensor, generator: torch.Generator
) -> None:
    on_grid = quantizer.quantize(weight).dequantize(torch.float32)
    latents, moved = off_grid(on_grid, quantizer, name="layer", seed=0)
    assert moved and latents.dtype == torch.float32
    assert quantizer.quantize(latents).equals(quantizer.quantize(on_grid))
    # The extremes of a group stay exact, so the update leaves them: the grid itself does not move.
    update = 0.02 * torch.randn(weight.shape, generator=generator) * weight.std()
    update = update.masked_fill(on_grid.abs() > 0.5 * on_grid.abs().amax(), 0.0)

    def realised(start: torch.Tensor) -> float:
        change = quantizer(start + update) - quantizer(start)
        return float((change * update).sum() / update.square().sum())

    if quantizer.bits == 4:
        # FP4 has three levels within 1/100 of the maximum around zero, between which even small updates move.
        assert realised(on_grid) < (0.1 if isinstance(quantizer, FP4) else 0.05)
        assert 0.85 < realised(latents) < 1.15


def test_randomness_depends_on_seed_and_layer_only(quantizer: Quantizer, weight: torch.Tensor) -> None:
    on_grid = quantizer.quantize(weight).dequantize(torch.float32)

    def latents(name: str, seed: int) -> torch.Tensor:
        return off_grid(on_grid, quantizer, name=name, seed=seed)[0]

    assert torch.equal(latents("a", 3), latents("a", 3))
    assert not torch.equal(latents("a", 3), latents("a", 4))
    assert not torch.equal(latents("a", 3), latents("b", 3))


@pytest.mark.parametrize("options", [{"range": "rms"}, {"range": "mse"}, {"clip": 0.9}])
def test_a_range_that_is_fitted_anew_takes_a_weight_as_it_is_and_refuses_its_own_points(
    options: dict, weight: torch.Tensor
) -> None:
    clipped = Affine(bits=4, group_size=64, **options)
    latents, moved = off_grid(weight, clipped, name="w", seed=0)
    assert latents is weight and not moved
    with pytest.raises(ModelError, match=r"layers\.0: the weight lies on the grid of qat\.weights already"):
        off_grid(clipped(weight), clipped, name="layers.0", seed=0)
