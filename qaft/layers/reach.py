"""Which layers a forward pass goes through, and a zero gradient for the parameters of those that it does not.

A layer may be left out: an expert to which no token is routed, a projection that the model's code never calls. With no
gradient at all, data-parallel processes would wait for it, and an optimizer would skip the parameter on one process
where another one, with other tokens, steps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def reached(layers: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Yield a set that collects the names of the layers that are called inside the block."""
    names: set[str] = set()
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(lambda *_, name=name: names.add(name)).remove)
        yield names


def zero_for_others(layers: Mapping[str, nn.Module], names: set[str]) -> Tensor | None:
    """Return a zero whose gradient is zero in every trained parameter of ``layers`` but those of ``names``; None when
    these are all.
    """
    if len(names) == len(layers):
        return None
    touched = {id(p) for name in names for p in layers[name].parameters()}
    others = {id(p): p for m in layers.values() for p in m.parameters() if p.requires_grad and id(p) not in touched}
    # Of no element: 0 * p.sum() would read p, and be NaN where the sum overflows.
    terms = [p.flatten()[:0].sum(dtype=torch.float32) for p in others.values()]
    return torch.stack(terms).sum() if terms else None
