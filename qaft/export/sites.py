"""The layers whose inputs are quantized, and the integers that a model makes of given inputs there.

Two models run the same function where the same inputs become the same codes. The inputs are those of the trained model
on one prompt, so that what one layer computes otherwise is not counted again in every layer behind it.

Shapes: T = tokens, I = inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn

from qaft.evaluate.float32 import float_logits
from qaft.layers.inputs import input_of
from qaft.quant.activation import TokenQuantizer

MAX_TOKENS = 32
"""Tokens kept per layer: a 7B model has 150 MB of inputs on them."""

Codes = Callable[[Tensor], Tensor]
"""Inputs [1, T, I] -> integers [1, T, I]."""


def input_sites(model: nn.Module) -> dict[str, Codes]:
    """Return what each layer with quantized inputs makes of them, by module path.

    Args:
        model: with layers of this package, or as transformers loads a compressed-tensors checkpoint.
    """
    found = {name: _codes(module) for name, module in model.named_modules()}
    return {name: codes for name, codes in found.items() if codes is not None}


def record_inputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return what each layer with quantized inputs reads on a prompt (int64 [T]), fp32 [T, I] on the CPU."""
    kept: dict[str, Tensor] = {}
    # Before every other hook: an online rotation is part of the layer.
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_keep(kept, name), prepend=True)
        for name in input_sites(model)
    ]
    try:
        float_logits(model, [ids])
    finally:
        for handle in handles:
            handle.remove()
    return kept


@torch.no_grad()
def input_codes(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the integers of each recorded layer's inputs, int16 [T, I] on the CPU.

    A layer that does not quantize its inputs is left out.
    """
    device, sites = next(model.parameters()).device, input_sites(model)
    return {
        name: sites[name](x.to(device)[None])[0].to(device="cpu", dtype=torch.int16)
        for name, x in inputs.items()
        if name in sites
    }


def code_flips(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the share of codes that differ, by layer; 1 for a layer that one of the models does not quantize."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    return {
        name: float((ours[name] != theirs[name]).double().mean()) if name in ours and name in theirs else 1.0
        for name in names
    }


def _codes(module: nn.Module) -> Codes | None:
    before = input_of(module)
    if before is not None and isinstance(before.quantizer, TokenQuantizer):
        rotation, quantizer = before.rotation, before.quantizer
        return lambda x: quantizer.codes(x if rotation is None else rotation(x))
    args = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
    if args is None or not getattr(module, "quantization_enabled", True):
        return None

    def library_codes(x: Tensor) -> Tensor:
        scale, zero_point = compute_dynamic_scales_and_zp(x, args, module)
        return quantize(x, scale, zero_point, args)

    return library_codes


def _keep(kept: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        # A copy: layers that read the same tensor would share it, and a later layer may change it in place.
        kept[name] = args[0].detach().flatten(0, -2)[:MAX_TOKENS].to("cpu", torch.float32, copy=True).contiguous()

    return hook
