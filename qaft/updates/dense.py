"""A full update of the weight: ``dW [O, I]``.

    W = W0 + dW

The delta, not the weight, is the parameter: weight decay on it is the proximal pull towards the base model, and its
fp32 values keep steps that a 16-bit weight would round away. QV-only fine-tuning (arXiv 2410.02247) is this update on
q_proj and v_proj.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaft.bases.base import LinearSpec, Matmul
from qaft.updates.base import Update


class DenseDelta(Update):
    """``y = W0 x + dW x``; O * I trainables.

    Args:
        spec: the layer to adapt.
    """

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(spec.out_features, spec.in_features, dtype=spec.dtype))

    def forward(self, x: Tensor, base: Matmul) -> Tensor:
        """Return the updated output, [..., I] -> [..., O]."""
        return base(x) + F.linear(x, self.delta.to(x.dtype))

    def merge(self, weight: Tensor) -> Tensor:
        """Return ``W0 + dW``, [O, I]."""
        return weight + self.delta.to(weight.dtype)
