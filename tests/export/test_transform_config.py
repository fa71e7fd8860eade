"""Which online rotations a transform_config can hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qaft.bases.dense import DenseBase
from qaft.errors import ExportError
from qaft.export.transform_config import online_rotation, transform_config
from qaft.layers.inputs import LayerInput, put_before
from qaft.rotation.blocks import BlockDiagonal
from qaft.rotation.hadamard import Hadamard


def layer(rotation: nn.Module | None, *, bias: bool = False) -> DenseBase:
    made = DenseBase(torch.ones(4, 48), torch.ones(4) if bias else None)
    if rotation is not None:
        put_before(made, LayerInput(rotation=rotation))
    return made


def test_blocks_of_one_size_are_one_group_with_the_layers_that_have_it() -> None:
    block = BlockDiagonal(48, Hadamard(16))
    layers = {"a.down": layer(block), "a.up": layer(None), "b.down": layer(None), "c.down": layer(block)}
    found = transform_config(layers)
    assert found is not None and list(found["config_groups"]) == ["R4"]
    group = found["config_groups"]["R4"]
    assert (group["type"], group["head_dim"], group["apply"][0]["targets"]) == ("hadamard", 16, ["a.down", "c.down"])
    everywhere = transform_config({"a.down": layer(block), "a.up": layer(None)})
    assert everywhere is not None and everywhere["config_groups"]["R4"]["apply"][0]["targets"] == [r"re:.*\.down$"]


def test_blocks_of_two_sizes_are_two_groups() -> None:
    layers = {"a.down": layer(BlockDiagonal(48, Hadamard(16))), "b.down": layer(BlockDiagonal(48, Hadamard(4)))}
    found = transform_config(layers)
    assert found is not None and list(found["config_groups"]) == ["R4_4", "R4_16"]


def test_without_rotations_there_is_no_section() -> None:
    assert transform_config({"a": layer(None)}) is None
    assert online_rotation(layer(None)) is None


REFUSED = {
    "random signs": (layer(BlockDiagonal(48, Hadamard(16, seed=1))), "Sylvester"),
    "no power of two": (layer(BlockDiagonal(48, Hadamard(12))), "Sylvester"),
    "bias": (layer(BlockDiagonal(48, Hadamard(16)), bias=True), "without bias"),
}


@pytest.mark.parametrize(("made", "message"), REFUSED.values(), ids=REFUSED)
def test_what_vllm_has_no_kernel_for_is_refused(made: DenseBase, message: str) -> None:
    with pytest.raises(ExportError, match=rf"a\.down: .*{message}"):
        transform_config({"a.down": made})
