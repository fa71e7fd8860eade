"""What is special to row and column updates."""

from __future__ import annotations

import pytest
import torch

from qaft.bases.base import LinearSpec
from qaft.updates.choose import choose_indices
from qaft.updates.roco import RoCo


def spec(out_features: int, in_features: int, **extra) -> LinearSpec:
    return LinearSpec(name="layer", out_features=out_features, in_features=in_features, **extra)


def test_row_update_leaves_other_rows_bit_identical() -> None:
    update = RoCo(spec(16, 8), rows=3, choose="random")
    update.row_delta.data.normal_()
    w = torch.randn(16, 8)
    touched = (update.merge(w) != w).any(1).nonzero().flatten()
    assert torch.equal(touched, update.rows)


def test_gradients_are_the_rows_and_columns_of_the_full_gradient() -> None:
    update = RoCo(spec(6, 5, dtype=torch.float64), rows=2, columns=2, choose="random")
    x, g = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    w = torch.randn(6, 5, dtype=torch.float64)
    (update(x, lambda v: v @ w.T) * g).sum().backward()
    full = g.T @ x
    torch.testing.assert_close(update.row_delta.grad, full[update.rows])
    expected = full[:, update.columns].clone()
    expected[update.rows] = 0  # rows own the intersection
    torch.testing.assert_close(update.column_delta.grad, expected)


def test_per_head_puts_one_row_in_every_head_before_a_second() -> None:
    rows = choose_indices(6, 64, choose="per_head", name="q", generator=torch.Generator(), num_heads=4)
    assert (rows // 16).bincount().tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize(("choose", "expected"), [("max", [1, 4]), ("min", [0, 3]), ("mixed", [0, 4])])
def test_scored_choices_follow_the_scores(choose, expected) -> None:
    scores = torch.tensor([0.0, 5.0, 3.0, 1.0, 9.0])
    chosen = choose_indices(2, 5, choose=choose, name="q", generator=torch.Generator(), scores=scores)
    assert chosen.tolist() == expected


def test_random_choice_repeats_with_its_seed_and_differs_between_layers() -> None:
    def rows(name: str, seed: int) -> list[int]:
        layer = LinearSpec(name=name, out_features=512, in_features=4, seed=seed)
        return RoCo(layer, rows=5, choose="random").rows.tolist()

    assert rows("a", 0) == rows("a", 0)
    assert rows("a", 0) != rows("b", 0)
    assert rows("a", 0) != rows("a", 1)


@pytest.mark.parametrize(
    "options", [{}, {"rows": 17}, {"columns": -1}, {"rows": 1, "choose": "best"}, {"rows": 1, "choose": "max"}]
)
def test_impossible_options_name_the_layer_and_the_range(options) -> None:
    with pytest.raises(ValueError, match="layer"):
        RoCo(spec(16, 8), **options)
