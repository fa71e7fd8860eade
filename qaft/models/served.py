"""What a compressed-tensors checkpoint asks of its server and transformers leaves out or computes otherwise.

    transform_config     x -> x B before down (R4): transformers ignores it, without an error
    inputs: vllm         x -> the integers of vLLM's kernels, max |x| / q_max: compressed-tensors divides by q_max + 1/2

Both are put in front of the layers of the model that transformers has loaded, so that it computes what was trained.
The first is the checkpoint's own; the second is in the record that an export writes, because no argument of
compressed-tensors says it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from qaft.errors import ModelError
from qaft.layers.inputs import LayerInput, put_before
from qaft.quant.activation import TokenQuantizer
from qaft.rotation.base import Rotation
from qaft.rotation.blocks import BlockDiagonal
from qaft.rotation.hadamard import Hadamard

STAMP = "qaft_export.json"
"""The record in an exported folder: ``qaft/export/card.py`` writes it."""

_OFFLINE = ("weight_input", "weight_output")


@dataclass(frozen=True)
class Serving:
    """What is to be put in front of layers, by module path.

    Attributes:
        rotations: online rotations.
        quantizers: fake quantizers of inputs, in place of those of compressed-tensors.
    """

    rotations: Mapping[str, Rotation]
    quantizers: Mapping[str, TokenQuantizer]

    def put_into(self, model: nn.Module) -> None:
        """Let the inputs of the layers of a loaded model pass through these."""
        for name in dict.fromkeys([*self.rotations, *self.quantizers]):
            layer, quantizer = model.get_submodule(name), self.quantizers.get(name)
            if quantizer is not None:
                # compressed-tensors reads this attribute before it quantizes inputs; the weights are unpacked.
                layer.quantization_enabled = False  # pyright: ignore[reportArgumentType]
            put_before(layer, LayerInput(rotation=self.rotations.get(name), quantizer=quantizer))


def serving_of(model: nn.Module, name: str | Path) -> Serving:
    """Return what a model that transformers has loaded from ``name`` lacks; nothing for formats without such parts.

    Args:
        model: the loaded and unpacked model.
        name: its folder or hub id.

    Raises:
        ModelError: the checkpoint asks for a transform that only its server has.
    """
    config, _ = PretrainedConfig.get_config_dict(str(name))
    section = config.get("quantization_config") or {}
    rotations = dict(_rotations(model, section.get("transform_config") or {}, str(name)))
    quantizers = {}
    if _recorded_inputs(Path(name)) == "vllm":
        for path, module in model.named_modules():
            inputs = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
            if inputs is not None:
                quantizers[path] = TokenQuantizer(bits=inputs.num_bits)
    return Serving(rotations, quantizers)


def _recorded_inputs(folder: Path) -> str | None:
    path = folder / STAMP
    return json.loads(path.read_text(encoding="utf-8")).get("inputs") if path.is_file() else None


def _rotations(model: nn.Module, section: Mapping[str, Any], where: str) -> Iterator[tuple[str, Rotation]]:
    for group in section.get("config_groups", {}).values():
        for args in group["apply"]:
            if args["location"] in _OFFLINE:
                continue
            if args["location"] != "input" or group["type"] != "hadamard" or group.get("randomize"):
                raise ModelError(
                    f"{where}: transform_config has a {group['type']} at {args['location']}, which transformers would "
                    "leave out and qaft does not have (only hadamard at input); run it with vLLM"
                )
            for name, module in model.named_modules():
                if _matches(name, module, args["targets"]) and not _matches(name, module, args.get("ignore", ())):
                    yield name, _hadamard(module, group.get("head_dim"), where)


def _hadamard(module: nn.Module, head_dim: int | None, where: str) -> Rotation:
    width = int(module.in_features)  # pyright: ignore[reportArgumentType]
    size = head_dim or width
    if size & (size - 1) or width % size:
        raise ModelError(f"{where}: transform_config rotates inputs of {width} in blocks of {size}, no power of two")
    return BlockDiagonal(width, Hadamard(size, seed=None))


def _matches(name: str, module: nn.Module, targets: Any) -> bool:
    names = (name, type(module).__name__)
    return any(re.match(t.removeprefix("re:"), name) if t.startswith("re:") else t in names for t in targets)
