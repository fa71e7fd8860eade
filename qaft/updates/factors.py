"""What updates of a given rank have in common: the check of the rank, and how the first factor starts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qaft.bases.base import LinearSpec


def check_rank(spec: LinearSpec, rank: int) -> None:
    """Refuse a rank that the weight cannot have.

    Raises:
        ValueError: rank is not in [1, min(O, I)].
    """
    limit = min(spec.out_features, spec.in_features)
    if not 1 <= rank <= limit:
        raise ValueError(
            f"{spec.name}: rank={rank} must be in [1, {limit}] for a [{spec.out_features}, {spec.in_features}] weight"
        )


def random_down(spec: LinearSpec, rank: int) -> Tensor:
    """Return LoRA's start of the factor that reads the input, [rank, I] (Kaiming uniform, a = sqrt 5).

    The layer's name is part of the seed, so that a layer starts the same whatever else is adapted.
    """
    generator = spec.generator()
    down = torch.empty(rank, spec.in_features)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    return down.to(spec.dtype)
