"""What adapted layers do differently for the length of one forward pass: show the base model, or add noise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from qaft.layers.adapted import AdaptedLinear
from qaft.philox import hash64


@contextmanager
def showing(layers: Mapping[str, AdaptedLinear], what: Literal["base", "unquantized_base"]) -> Iterator[None]:
    """Run the block with every layer as it was before training; of what a regularizer compares with.

    Args:
        layers: adapted layers by name.
        what: ``base``: on the grid that is trained through; ``unquantized_base``: without any grid.
    """
    for layer in layers.values():
        layer.shows = what
    try:
        yield
    finally:
        for layer in layers.values():
            layer.shows = "trained"


@contextmanager
def noisy(layers: Mapping[str, AdaptedLinear], sigmas: Mapping[str, float], seed: int) -> Iterator[None]:
    """Run the block with what updates add to outputs multiplied by N(1, sigma^2), in training mode.

    Args:
        layers: adapted layers by name.
        sigmas: standard deviation by the same names.
        seed: equal seeds give equal noise, whatever else is drawn meanwhile.
    """
    for name, layer in layers.items():
        layer.noise = _noise(sigmas[name], hash64(seed, name) >> 1)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.noise = None


def _noise(sigma: float, seed: int) -> Callable[[Tensor], Tensor]:
    def draw(y: Tensor) -> Tensor:
        # One draw for each sample and channel, shared by all tokens of the sample.
        shape = (y.shape[0], *(1,) * (y.ndim - 2), y.shape[-1])
        generator = torch.Generator(y.device).manual_seed(seed)
        return 1 + sigma * torch.randn(shape, generator=generator, dtype=y.dtype, device=y.device)

    return draw


def block_of(name: str) -> int:
    """Return the number of the decoder block in a module path: 3 for ``model.layers.3.mlp.up_proj``; -1 for none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else -1
