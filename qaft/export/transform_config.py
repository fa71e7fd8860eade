"""``transform_config`` of a compressed-tensors checkpoint: the online half of R4, run by vLLM, ignored by transformers.

    down(x) = (x B) W'^T,    W' = W B,    B = I (x) H_n / sqrt(n), symmetric

Written is what a reader has to do, x -> x B at the input of down; the other half and the signs are in the weights of
down and up already, so a reader that carried out offline entries too would find none. Without tensors: Sylvester's
matrix follows from its size, and vLLM's kernel for the type ``hadamard`` holds it.

Source: compressed-tensors 0.20.0, ``transform/``; vLLM 0.33.0, ``compressed_tensors/transform/module.py`` (no tensor
parallelism) and ``linear.py`` (no bias).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from compressed_tensors.transform import TransformArgs, TransformConfig, TransformLocation, TransformScheme
from torch import nn

from qaft.errors import ExportError
from qaft.export.base import Linear
from qaft.layers.inputs import input_of
from qaft.rotation.blocks import BlockDiagonal
from qaft.rotation.hadamard import Hadamard


def transform_config(layers: Mapping[str, Linear]) -> dict[str, Any] | None:
    """Return the section for layers whose inputs are rotated, or None where none are.

    Args:
        layers: module path -> layer, all of the model's.

    Raises:
        ExportError: a rotation that vLLM has no kernel for, or a rotated layer with a bias.
    """
    blocks = {name: _block(name, layer) for name, layer in layers.items() if online_rotation(layer) is not None}
    if not blocks:
        return None
    groups = {
        f"R4_{size}" if len(set(blocks.values())) > 1 else "R4": TransformScheme(
            type="hadamard",
            head_dim=size,
            apply=[
                TransformArgs(
                    targets=_targets([name for name in blocks if blocks[name] == size], layers),
                    location=TransformLocation.INPUT,
                )
            ],
        )
        for size in sorted(set(blocks.values()))
    }
    return TransformConfig(config_groups=groups).model_dump(mode="json")


def online_rotation(layer: nn.Module) -> nn.Module | None:
    """Return what rotates the inputs of a layer while the model runs, or None."""
    inputs = input_of(layer)
    return None if inputs is None else inputs.rotation


def _block(name: str, layer: Linear) -> int:
    rotation = online_rotation(layer)
    block = rotation.block if isinstance(rotation, BlockDiagonal) else rotation
    # Products of Sylvester matrices are Sylvester matrices, so only the width counts.
    if not isinstance(block, Hadamard) or block.seed is not None or block.size & (block.size - 1):
        raise ExportError(
            f"{name}: its inputs pass through {block}, but vLLM's kernel rotates by Sylvester's matrices of a power of "
            "two without signs; train with qat.rotation hadamard"
        )
    if layer.bias is not None:
        raise ExportError(f"{name}: vLLM transforms inputs of layers without bias only; train with qat.target portable")
    return block.size


def _targets(names: Sequence[str], layers: Mapping[str, Linear]) -> list[str]:
    """Return one pattern where it matches these layers and no other, else the names."""
    leaf = names[0].rpartition(".")[2]
    pattern = rf".*\.{re.escape(leaf)}$"
    return [f"re:{pattern}"] if [n for n in layers if re.match(pattern, n)] == list(names) else list(names)
