"""What survives requantization: known cases on and off the grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qaft.errors import ExportError
from qaft.export.survival import Survival, require_survival, survival, survival_table
from qaft.quant.affine import Affine

GRID = Affine(bits=4, group_size=128)


def served(weight: Tensor) -> Tensor:
    return GRID.quantize(weight).dequantize(torch.float32)


def measured(base: Tensor, relative_size: float, generator: torch.Generator) -> Survival:
    update = torch.randn(256, 8, generator=generator) @ torch.randn(8, 512, generator=generator)
    updated = base + update * (relative_size * base.norm() / update.norm())
    return survival("layer", base, updated, served(base), served(updated))


@pytest.mark.parametrize(("size", "low", "high"), [(0.01, -0.01, 0.01), (0.05, 0.0, 0.12), (0.5, 0.9, 1.1)])
def test_a_base_on_its_grid_swallows_small_updates(
    generator: torch.Generator, size: float, low: float, high: float
) -> None:
    base = served(torch.randn(256, 512, generator=generator))
    assert low <= share(measured(base, size, generator)) <= high


def test_of_a_one_percent_update_on_the_grid_the_whole_effect_is_lost(generator: torch.Generator) -> None:
    # Above 1: the update moves a few group maxima, and with them scales that the update did not ask for.
    row = measured(served(torch.randn(256, 512, generator=generator)), 0.01, generator)
    assert 1.0 <= row.error <= 1.1


@pytest.mark.parametrize("size", [0.01, 0.05])
def test_a_base_off_the_grid_realizes_the_update_on_average(generator: torch.Generator, size: float) -> None:
    assert share(measured(torch.randn(256, 512, generator=generator), size, generator)) == pytest.approx(1.0, abs=0.05)


def test_an_update_that_is_kept_exactly_has_share_one_and_error_zero(generator: torch.Generator) -> None:
    base, updated = torch.randn(4, 8, generator=generator), torch.randn(4, 8, generator=generator)
    row = survival("x", base, updated, base, updated)
    assert (row.share, row.error) == (pytest.approx(1.0), 0.0)


def test_a_layer_without_an_update_reports_its_own_error(generator: torch.Generator) -> None:
    weight = torch.randn(4, 128, generator=generator)
    row = survival("x", weight, weight, served(weight), served(weight))
    assert row.share is None
    assert row.error == pytest.approx(float((served(weight) - weight).norm() / weight.norm()), rel=1e-5)


def test_losing_layers_are_refused_without_force_and_named() -> None:
    rows = [
        Survival("good", 0.9, 0.1),
        Survival("bad", 0.1, 1.0),
        Survival("worse", float("nan"), 1.0),
        Survival("frozen", None, 0.1),
    ]
    with pytest.raises(ExportError, match=r"2 of 4 .*bad keeps 10\.0%"):
        require_survival(rows, force=False)
    require_survival(rows, force=True)
    require_survival([rows[0], rows[3]], force=False)


def test_the_table_has_a_row_per_layer() -> None:
    table = survival_table([Survival("a", 0.5, 0.1), Survival("b", None, 0.2)])
    assert [list(column.cells) for column in table.columns] == [["a", "b"], ["50.0%", "no update"], ["0.100", "0.200"]]


def share(row: Survival) -> float:
    assert row.share is not None
    return row.share
