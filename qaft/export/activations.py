"""What training did to activations, which a checkpoint's tensors cannot say: noted for whoever serves it."""

from __future__ import annotations

from torch import nn

from qaft.layers.activations import activation_quantizers
from qaft.quant.activation import TokenQuantizer
from qaft.quant.kv import KVQuantizer, VllmKV


def activation_notes(model: nn.Module, *, inputs_written: bool = False) -> tuple[str, ...]:
    """Return what a reader of the export has to be told to do, one note per kind of quantizer.

    Args:
        model: the live model.
        inputs_written: the export says itself how inputs are quantized.
    """
    notes, found = [], [quantizer for _, _, quantizer in activation_quantizers(model)]
    inputs = [str(quantizer) for quantizer in found if isinstance(quantizer, TokenQuantizer) and not inputs_written]
    for quantizer in dict.fromkeys(inputs):
        notes.append(
            f"trained with quantized inputs, {quantizer}: the file holds weights only, so serve it with activations "
            "quantized like this; it was compared without"
        )
    caches = [quantizer for quantizer in found if isinstance(quantizer, KVQuantizer)]
    if any(isinstance(cache, VllmKV) for cache in caches):
        notes.append("trained with vLLM's int4 KV cache: serve it with --kv-cache-dtype int4_per_token_head")
    elif caches:
        notes.append(f"trained with the KV cache of RoSTE, {caches[0]}: no server has this function")
    return tuple(notes)
