"""Fake quantizers of activations: which a model has, and the model without them for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qaft.quant.activation import TokenQuantizer
from qaft.quant.kv import KVQuantizer


def activation_quantizers(model: nn.Module) -> list[tuple[nn.Module, str, TokenQuantizer | KVQuantizer]]:
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
    """Let the live model compute without fake quantization of activations; rotations stay. Afterwards it is as it was.

    Args:
        model: the live model.
        keep_inputs: leave the quantizers of inputs in place, and take those of the KV cache alone.
    """
    found = [part for part in activation_quantizers(model) if not (keep_inputs and isinstance(part[2], TokenQuantizer))]
    try:
        for parent, name, _ in found:
            setattr(parent, name, nn.Identity())
        yield
    finally:
        for parent, name, quantizer in found:
            setattr(parent, name, quantizer)
