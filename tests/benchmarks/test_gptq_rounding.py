"""The GPTQ-style baseline of the RoSTE comparison."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gptq import gptq_round, gptq_weight
from tiny_job import job
from torch import Tensor

from qaft.arch import arch_of
from qaft.bases.dense import DenseBase
from qaft.build import build_run
from qaft.quant.affine import Affine
from qaft.recipe import parse_recipe

GRIDS = {
    "groups": Affine(bits=4, group_size=16),
    "channels with zero points": Affine(bits=4, group_size=None, symmetric=False, clip=0.95),
    "3 bits": Affine(bits=3, group_size=32, symmetric=False),
}


def correlated(generator: torch.Generator, rows: int, width: int) -> Tensor:
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(rows, width, generator=generator) @ mixing


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_with_uncorrelated_inputs_it_is_plain_rounding(grid: Affine, generator: torch.Generator) -> None:
    weight = torch.randn(24, 64, generator=generator)
    rounded = gptq_weight(weight, torch.eye(64), grid)
    torch.testing.assert_close(rounded, grid(weight), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_with_correlated_inputs_the_output_error_is_smaller(grid: Affine, generator: torch.Generator) -> None:
    weight, x = torch.randn(24, 64, generator=generator), correlated(generator, 512, 64)
    rounded = gptq_weight(weight, x.T @ x, grid)

    def error(other: Tensor) -> float:
        return float((x @ (other - weight).T).square().sum())

    assert error(rounded) < 0.6 * error(grid(weight))


def test_a_column_is_rounded_with_what_earlier_columns_have_lost(generator: torch.Generator) -> None:
    # Two columns in closed form: the second minimizes the error given the first.
    grid = Affine(bits=4, group_size=None)
    weight, x = torch.randn(5, 2, generator=generator), correlated(generator, 64, 2)
    hessian = (x.T @ x).double()
    rounded = gptq_weight(weight, hessian, grid, damping=0.0)
    scale = grid.quantize(weight).scale.double()
    first = scale * (weight[:, :1] / scale).round().clamp(-8, 7)
    moved = weight[:, 1:] + (weight[:, :1] - first) * hessian[0, 1] / hessian[1, 1]
    second = scale * (moved / scale).round().clamp(-8, 7)
    torch.testing.assert_close(rounded.double(), torch.cat([first, second], 1), rtol=0, atol=1e-6)


def test_an_input_that_is_always_zero_does_no_harm(generator: torch.Generator) -> None:
    x = correlated(generator, 64, 32)
    x[:, 7] = 0
    rounded = gptq_weight(torch.randn(8, 32, generator=generator), x.T @ x, Affine(bits=4, group_size=16))
    assert bool(rounded.isfinite().all())


def test_every_linear_of_a_model_is_on_its_grid_afterwards(tiny_llama: Path, tmp_path: Path) -> None:
    qat = {"weights": {"bits": 4, "group_size": 32}, "activations": {"bits": 8}, "rotation": "none"}
    run = build_run(parse_recipe(job(tiny_llama, tmp_path, qat=qat, select={"targets": ["all"]})))
    plain = {name: layer.weight().detach() for name, layer in run.layers.items()}
    scales = {name: layer.quantized().scale for name, layer in run.layers.items()}  # type: ignore[union-attr]
    ids = torch.arange(2, 62).view(2, 30)
    real = torch.ones(2, 30, dtype=torch.bool)
    inputs = {"input_ids": ids, "use_cache": False}
    gptq_round(run.loaded.model, arch_of(run.loaded.source.config).layers(), inputs, real)
    for name in run.layers:
        layer = run.loaded.model.get_submodule(name)
        assert isinstance(layer, DenseBase) and layer.inputs.quantizer is not None
        assert not torch.equal(layer.weight, plain[name])
        # The first group of a row is scaled as plain rounding scales it.
        levels = layer.weight[:, :32] / scales[name][:, :1].float()
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
