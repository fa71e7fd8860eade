"""Compute with dense weights for a while: token by token, rebuilding packed ones would cost more than the products.

The values are those of the packed forward, bit for bit: what is kept is what each layer would rebuild for every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import nn

from qaft.bases.base import FrozenLinear
from qaft.bases.dense import DenseBase
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.attach import replace_module
from qaft.layers.inputs import input_of, put_before

MEMORY_SHARE = 0.5
"""Share of the free memory that dense weights may take; above it the model stays packed and is only slower."""


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Replace packed and fake-quantized layers by their dense weights where memory allows it; restored afterwards."""
    layers = _rebuilt_layers(model)
    needed = sum(_dense_bytes(layer) for layer in layers.values())
    if not layers or needed > MEMORY_SHARE * _free_bytes(next(model.parameters()).device):
        yield
        return
    try:
        with torch.no_grad():
            for name, layer in layers.items():
                weight = layer.weight() if isinstance(layer, AdaptedLinear) else layer.dequantize()
                replace_module(model, name, _with_inputs_of(layer, DenseBase(weight, layer.bias)))
        yield
    finally:
        for name, layer in layers.items():
            replace_module(model, name, layer)


def _with_inputs_of(layer: nn.Module, dense: DenseBase) -> DenseBase:
    """Return ``dense`` with the online rotation and the input quantizer of the layer that it stands in for."""
    inputs = input_of(layer)
    if inputs is not None:
        put_before(dense, inputs)
    return dense


def _rebuilt_layers(model: nn.Module) -> dict[str, AdaptedLinear | FrozenLinear]:
    """Return the layers whose forward rebuilds a weight; a packed base inside a fake-quantized layer goes with it."""
    whole = {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLinear) and _is_fake_quantized(m)}
    inside = {f"{name}.base" for name in whole}
    packed = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, FrozenLinear) and not isinstance(m, DenseBase) and n not in inside
    }
    return {**whole, **packed}


def _is_fake_quantized(layer: AdaptedLinear) -> bool:
    plain_input = isinstance(layer.rotation, nn.Identity) and isinstance(layer.act_quantizer, nn.Identity)
    return layer.quantizer is not None and plain_input


def _dense_bytes(layer: AdaptedLinear | FrozenLinear) -> int:
    return layer.in_features * layer.out_features * layer.dtype.itemsize


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
