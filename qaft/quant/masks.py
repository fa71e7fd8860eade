"""Where the gradient passes a quantizer: identity, clamp or trust.

    identity   everywhere                              RoSTE, SpinQuant
    clamp      where  low <= w / s <= high             the derivative of clamp(w / s, low, high): the default
    trust      where  |w / s - Q(w) / s| <= T          QuEST; T is half of the widest step of the grid

``low`` and ``high`` are the outermost levels in units of the scale s, which is a constant in backward. The error of a
value between two levels is at most half their distance, so both masks are intervals: trust reaches T beyond clamp.

Source: RoSTE (arXiv 2502.09003), section 3; QuEST (arXiv 2502.05003), equation 5, with its default T.
Shapes: O = out_features, G = groups, N = weights per group.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASKS = ("identity", "clamp", "trust")


def check_mask(ste: str) -> str:
    """Return ``ste`` if it is the name of a mask.

    Raises:
        ValueError: it is not.
    """
    if ste not in MASKS:
        raise ValueError(f"ste={ste!r} must be one of {', '.join(MASKS)}")
    return ste


def wants_mask(weight: Tensor, ste: str) -> bool:
    """Return whether backward will ask for a mask: a gradient is recorded and not every value passes."""
    return ste != "identity" and weight.requires_grad and torch.is_grad_enabled()


def inside(scaled: Tensor, low: Tensor | float, high: Tensor | float, *, ste: str, half_step: float) -> Tensor:
    """Return where the gradient passes, bool of the shape of ``scaled``.

    Args:
        scaled: w / s, [O, G, N].
        low: the lowest level in units of s, a number or [O, G, 1].
        high: the highest level, likewise.
        ste: "clamp" or "trust".
        half_step: T, half of the widest distance of neighbouring levels.
    """
    margin = half_step if ste == "trust" else 0.0
    return (scaled >= low - margin) & (scaled <= high + margin)
