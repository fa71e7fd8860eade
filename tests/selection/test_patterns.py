from __future__ import annotations

import pytest
import torch
from torch import nn

from qaft.bases.dense import DenseBase
from qaft.errors import TargetError
from qaft.selection.capture import capture_scores
from qaft.selection.patterns import Patterns, match_names

NAMES = [
    f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]


def test_patterns_match_whole_parts_only() -> None:
    assert match_names("q_proj", ["a.q_proj", "a.my_q_proj", "a.q_proj_x", "q_proj.b"]) == ("a.q_proj", "q_proj.b")


def test_order_is_that_of_the_model() -> None:
    assert Patterns(targets=["v_proj", "q_proj"])(NAMES) == tuple(n for n in NAMES if "up" not in n)


def test_layer_range_keeps_the_named_blocks() -> None:
    chosen = Patterns(targets=["q_proj"], layers=[2, 3])(NAMES)
    assert chosen == ("model.layers.2.self_attn.q_proj", "model.layers.3.self_attn.q_proj")


def test_regular_expressions_reach_single_blocks() -> None:
    assert Patterns(targets=[r"layers\.1\..*up_proj"])(NAMES) == ("model.layers.1.mlp.up_proj",)


def test_all_selects_everything() -> None:
    assert Patterns(targets=["all"])(NAMES) == tuple(NAMES)


def test_a_pattern_that_matches_nothing_lists_near_names() -> None:
    with pytest.raises(TargetError, match=r"q_porj.*near names: .*q_proj"):
        Patterns(targets=["v_proj", "q_porj"])(NAMES)


def test_a_broken_expression_is_named() -> None:
    with pytest.raises(TargetError, match="regular expression"):
        Patterns(targets=["q_proj("])(NAMES)


def test_scores_are_activation_norm_times_weight_mass() -> None:
    layer = DenseBase(torch.randn(3, 4))
    model = nn.Sequential(layer)
    batches = [torch.randn(2, 5, 4) for _ in range(3)]
    scores = capture_scores({"0": layer}, batches, model)["0"]
    x = torch.cat([b.flatten(0, 1) for b in batches])
    w = layer.dequantize()
    torch.testing.assert_close(scores.columns, x.norm(dim=0) * w.abs().sum(0))
    torch.testing.assert_close(scores.rows, (x @ w.T).norm(dim=0) * w.abs().sum(1))
