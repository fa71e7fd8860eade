"""What is put in front of layers of a checkpoint that asks for more than transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from qaft.errors import ModelError
from qaft.layers.inputs import input_of
from qaft.models.served import serving_of
from qaft.rotation.blocks import BlockDiagonal
from qaft.rotation.hadamard import Hadamard


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 24, bias=False)
        self.down = nn.Linear(24, 8, bias=False)


def folder_with(path: Path, scheme: dict[str, Any] | None) -> Path:
    config = LlamaConfig().to_dict()
    if scheme is not None:
        transforms = {"config_groups": {"R4": scheme}}
        config["quantization_config"] = {"quant_method": "compressed-tensors", "transform_config": transforms}
    (path / "config.json").write_text(json.dumps(config, default=str))
    return path


def scheme_of(target: str, **changes: Any) -> dict[str, Any]:
    return {
        "type": "hadamard",
        "head_dim": 8,
        "apply": [{"targets": [target], "location": "input", "inverse": False, "ignore": []}],
        **changes,
    }


@pytest.mark.parametrize("target", ["down", "re:.*own$"])
def test_a_transform_of_inputs_is_put_before_the_layers_that_it_names(tmp_path: Path, target: str) -> None:
    model = Tiny()
    serving = serving_of(model, folder_with(tmp_path, scheme_of(target)))
    assert set(serving.rotations) == {"down"} and not serving.quantizers
    x = torch.randn(2, 24)
    plain = model.down(x)
    serving.put_into(model)
    torch.testing.assert_close(model.down(x), rotated(x) @ model.down.weight.T)
    assert not torch.allclose(model.down(x), plain) and input_of(model.up) is None


def rotated(x: torch.Tensor) -> torch.Tensor:
    return BlockDiagonal(24, Hadamard(8))(x).detach()


def test_what_is_in_the_weights_already_is_not_done_again(tmp_path: Path) -> None:
    scheme = scheme_of("down")
    scheme["apply"] = [{"targets": ["down"], "location": "weight_input", "inverse": True}]
    assert not serving_of(Tiny(), folder_with(tmp_path, scheme)).rotations


@pytest.mark.parametrize("scheme", [None, {"apply": [], "type": "hadamard"}])
def test_a_folder_that_asks_for_nothing_gets_nothing(tmp_path: Path, scheme: Any) -> None:
    serving = serving_of(Tiny(), folder_with(tmp_path, scheme))
    assert not serving.rotations and not serving.quantizers


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another transform": (scheme_of("down", type="random-matrix"), "random-matrix at input.*run it with vLLM"),
    "another place": (
        scheme_of("down", apply=[{"targets": ["down"], "location": "output"}]),
        "hadamard at output.*run it with vLLM",
    ),
    "random order": (scheme_of("down", randomize=True), "run it with vLLM"),
    "no power of two": (scheme_of("down", head_dim=12), "inputs of 24 in blocks of 12, no power of two"),
    "the whole of an odd width": (scheme_of("down", head_dim=None), "inputs of 24 in blocks of 24"),
}


@pytest.mark.parametrize(("scheme", "message"), REFUSED.values(), ids=REFUSED)
def test_a_transform_that_would_be_left_out_is_refused(tmp_path: Path, scheme: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        serving_of(Tiny(), folder_with(tmp_path, scheme))
