"""Layers that a client library computes with rounded inputs, replaced for a while by the weights that they hold.

What a checkpoint holds is compared so, not how well a kernel computes with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qaft.layers.attach import replace_module


@contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """Let layers of bitsandbytes multiply with the weights that they hold, in the dtype of their input; then restore.

    Raises:
        ValueError: a layer has rounded its scales in an earlier forward pass.
    """
    layers = {n: m for n, m in model.named_modules() if type(m).__module__.partition(".")[0] == "bitsandbytes"}
    if not layers:
        yield
        return
    # bitsandbytes loads its native library on import: only for a model that has it in memory already.
    from qaft.bases.bnb_layout import held_by

    try:
        for name, layer in layers.items():
            replace_module(model, name, held_by(layer))
        yield
    finally:
        for name, layer in layers.items():
            replace_module(model, name, layer)
