from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from qaft.train.encoding import decode, encode


def through_json(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(value, "root", tensors))
    return decode(json.loads(text), tensors)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "x"], "b": {}},
        {0: {"step": 3}, 1: (0.9, 0.999)},
        {"__tensor__": "a user's key", "__items__": []},
        (3, (1, 2), None),
        {(1, 2): "tuple key", None: 0},
        0.1 + 0.2,
        {"lr": 1e-300, "big": 2**70},
    ],
)
def test_values_come_back_with_their_types(value: Any) -> None:
    result = through_json(value)
    assert result == value
    assert repr(result) == repr(value)


def test_tensors_come_back_bit_for_bit_and_under_a_readable_key() -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}}}
    encoded = json.loads(json.dumps(encode(state, "optimizer", tensors)))
    assert set(tensors) == {"optimizer.state.0.step", "optimizer.state.0.exp_avg"}
    decoded = decode(encoded, tensors)
    assert torch.equal(decoded["state"][0]["exp_avg"], state["state"][0]["exp_avg"])


def test_shared_tensor_is_stored_once_and_comes_back_shared() -> None:
    table = torch.arange(4)
    tensors: dict[str, torch.Tensor] = {}
    encoded = encode([table, {"again": table}], "x", tensors)
    assert len(tensors) == 1
    first, second = decode(encoded, tensors)
    assert first is second["again"]


def test_value_that_cannot_be_stored_is_named() -> None:
    with pytest.raises(TypeError, match=r"source\.seen\.1: set cannot be stored"):
        encode({"seen": [1, {2}]}, "source", {})
