"""Scaling along an axis by ``1 + d``: what IA3, SSL and SSB are made of.

``d`` is relative to what it scales, so a norm that is folded into the weight (``spec.input_scale``) needs no
correction: diag(1 + d) (W diag(g)) = (diag(1 + d) W) diag(g), whatever the size of g.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(x: Tensor, change: Tensor) -> Tensor:
    """Return ``x (1 + change)`` along the last axis, in the dtype of x."""
    # 1 + d in 16 bits would be off by one and the same amount in all that it scales; this sum rounds each its own way.
    return torch.addcmul(x, x, change.to(x.dtype))
