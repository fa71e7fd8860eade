"""What training did to activations, which a checkpoint's tensors cannot say: left out when comparing, and noted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qaft.quant.activation import TokenQuantizer
from qaft.quant.kv import KVQuantizer, VllmKV


def _quantizers(model: nn.Module) -> list[tuple[nn.Module, str, TokenQuantizer | KVQuantizer]]:
    """Return (parent, name, quantizer) for every fake quantizer of activations; parts of one are not listed."""
    parents = [module for module in model.modules() if not isinstance(module, KVQuantizer)]
    return [
        (parent, name, child)
        for parent in parents
        # Not named_children(), which lists a quantizer of keys and values once.
        for name, child in parent._modules.items()
        if isinstance(child, (TokenQuantizer, KVQuantizer))
    ]


@contextmanager
def plain_activations(model: nn.Module, *, keep_inputs: bool = False) -> Iterator[None]:
    """Let the live model compute without fake quantization of activations; afterwards it is as it was.

    Args:
        model: the live model.
        keep_inputs: leave the quantizers of inputs in place, and take those of the KV cache alone.
    """
    found = [part for part in _quantizers(model) if not (keep_inputs and isinstance(part[2], TokenQuantizer))]
    try:
        for parent, name, _ in found:
            setattr(parent, name, nn.Identity())
        yield
    finally:
        for parent, name, quantizer in found:
            setattr(parent, name, quantizer)


def activation_notes(model: nn.Module, *, inputs_written: bool = False) -> tuple[str, ...]:
    """Return what a reader of the export has to be told to do, one note per kind of quantizer.

    Args:
        model: the live model.
        inputs_written: the export says itself how inputs are quantized.
    """
    notes = []
    inputs = [str(q) for _, _, q in _quantizers(model) if isinstance(q, TokenQuantizer) and not inputs_written]
    for quantizer in dict.fromkeys(inputs):
        notes.append(
            f"trained with quantized inputs, {quantizer}: the file holds weights only, so serve it with activations "
            "quantized like this; it was compared without"
        )
    caches = [quantizer for _, _, quantizer in _quantizers(model) if isinstance(quantizer, KVQuantizer)]
    if any(isinstance(cache, VllmKV) for cache in caches):
        notes.append("trained with vLLM's int4 KV cache: serve it with --kv-cache-dtype int4_per_token_head")
    elif caches:
        notes.append(f"trained with the KV cache of RoSTE, {caches[0]}: no server has this function")
    return tuple(notes)
