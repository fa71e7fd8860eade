"""The layer-by-layer pass computes what the whole model computes, with one layer in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoint import write_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qaft.arch import arch_of
from qaft.models.layerwise import LayerwiseModel
from qaft.models.source import open_source

IDS = torch.arange(24).reshape(2, 12) * 7 % 61
FAMILIES = {"llama": {}, "gpt_neox": {"num_key_value_heads": 4}, "gemma": {"head_dim": 16}}


def _layerwise(folder: Path) -> LayerwiseModel:
    source = open_source(str(folder))
    return LayerwiseModel(source, arch_of(source.config), device=torch.device("cpu"))


def _loaded_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_the_hidden_states_of_the_whole_model(tmp_path: Path, family: str) -> None:
    folder = write_checkpoint(tmp_path, family=family, dtype=torch.float32, num_hidden_layers=3, **FAMILIES[family])
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected: list[Tensor] = []
    arch = arch_of(plain.config)
    for name in arch.layers():
        plain.get_submodule(name).register_forward_hook(
            lambda _, __, output: expected.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        plain(IDS)
    seen: list[Tensor] = []
    layerwise = _layerwise(folder)

    def before(_: int, layer: nn.Module) -> None:
        layer.register_forward_hook(
            lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )

    layerwise.run({"input_ids": IDS, "use_cache": False}, before=before, after=lambda *_: None)
    assert len(seen) == len(expected) == 3
    for mine, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_never_more_than_one_layer_or_one_embedding_is_in_memory(tmp_path: Path) -> None:
    layerwise = _layerwise(write_checkpoint(tmp_path, dtype=torch.float32, num_hidden_layers=4))
    sizes: list[int] = []
    order: list[int] = []

    def record(i: int, _: nn.Module) -> None:
        order.append(i)
        sizes.append(_loaded_bytes(layerwise.model))

    layer = layerwise.model.get_submodule("model.layers.0")
    one = sum(p.numel() * p.element_size() for p in layer.parameters())
    layerwise.run({"input_ids": IDS, "use_cache": False}, before=record, after=record)
    assert order == [0, 0, 1, 1, 2, 2, 3, 3]
    assert set(sizes) == {one}
    assert _loaded_bytes(layerwise.model) == 0


def test_a_failed_pass_leaves_no_weights_behind(tmp_path: Path) -> None:
    layerwise = _layerwise(write_checkpoint(tmp_path, dtype=torch.float32))

    def fail(i: int, _: nn.Module) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        layerwise.run({"input_ids": IDS, "use_cache": False}, before=fail, after=lambda *_: None)
    assert _loaded_bytes(layerwise.model) == 0
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in layerwise.model.modules())
