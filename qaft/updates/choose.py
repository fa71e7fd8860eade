"""Which rows or columns of a layer are trained.

Source: RoCoFT (arXiv 2410.10075) section 3 and its ablation of selection strategies; ``per_head`` is ours: with
``first``, the few trained rows of q_proj and v_proj would all lie in head 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHOICES = ("first", "random", "per_head", "max", "min", "mixed")
SCORED = frozenset({"max", "min", "mixed"})


def choose_indices(
    count: int,
    size: int,
    *,
    choose: str,
    name: str,
    generator: torch.Generator,
    scores: Tensor | None = None,
    num_heads: int | None = None,
) -> Tensor:
    """Return ``count`` distinct indices below ``size``, sorted, int64.

    Args:
        count: how many.
        size: rows or columns of the layer.
        choose: ``first``; ``random``; ``per_head`` (spread over heads, the same offsets in each round; spread evenly
            where rows have no heads); ``max`` / ``min`` by ``scores``; ``mixed`` (half of each).
        name: the layer, for messages.
        generator: source of ``random``.
        scores: [size] importance, needed by max, min and mixed.
        num_heads: heads among which ``size`` is divided, for ``per_head``.

    Raises:
        ValueError: unknown ``choose``, count out of range, or scores missing.
    """
    if choose not in CHOICES:
        raise ValueError(f"{name}: choose={choose!r} must be one of {', '.join(CHOICES)}")
    if not 0 <= count <= size:
        raise ValueError(f"{name}: {count} indices asked for, must be in [0, {size}]")
    if choose == "first":
        chosen = torch.arange(count)
    elif choose == "random":
        chosen = torch.randperm(size, generator=generator)[:count]
    elif choose == "per_head":
        chosen = _spread(count, size, num_heads or max(count, 1))
    else:
        chosen = _by_score(count, scores, choose=choose, name=name)
    return chosen.sort().values


def _spread(count: int, size: int, groups: int) -> Tensor:
    # index k goes to group k mod groups, at the next free offset inside that group
    groups = min(groups, size)
    k = torch.arange(count)
    return ((k % groups) * size) // groups + k // groups


def _by_score(count: int, scores: Tensor | None, *, choose: str, name: str) -> Tensor:
    if scores is None:
        raise ValueError(
            f"{name}: choose={choose!r} needs calibration scores; use first, random or per_head without data"
        )
    order = scores.float().cpu().argsort(descending=True, stable=True)
    top = {"max": count, "min": 0, "mixed": (count + 1) // 2}[choose]
    return torch.cat([order[:top], order[order.numel() - (count - top) :]])
