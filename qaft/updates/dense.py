"""A full update of the weight: ``dW [O, I]``.

    W = W0 + c D,    dW = c D                       c = spec.input_scale

The delta, not the weight, is the parameter: weight decay on it is the proximal pull towards the base model, and its
fp32 values keep steps that a 16-bit weight would round away. QV-only fine-tuning (arXiv 2410.02247) is this update on
q_proj and v_proj.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaft.bases.base import LinearSpec, Matmul
from qaft.bases.rebuilt import rebuilt_linear
from qaft.updates.base import Update


class DenseDelta(Update):
    """``y = W0 x + c D x``; O * I trainables.

    Args:
        spec: the layer to adapt.
    """

    formula = "W0 + c D"
    source = "QV-only fine-tuning, arXiv 2410.02247"

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.scale = spec.input_scale
        self.delta = nn.Parameter(torch.zeros(spec.out_features, spec.in_features, dtype=spec.dtype))

    def _change(self) -> Tensor:
        return self.scale * self.delta

    def forward(self, x: Tensor, base: Matmul) -> Tensor:
        """Return the updated output, [..., I] -> [..., O]."""
        # A cast copy of the delta, as large as the weight, would be kept for backward by F.linear.
        return base(x) + rebuilt_linear(x, self._change, None, self.delta)

    def merge(self, weight: Tensor) -> Tensor:
        """Return ``W0 + c D``, [O, I]."""
        return torch.add(weight, self.delta.to(weight.dtype), alpha=self.scale)

    def tangent(self, x: Tensor, base: Matmul, directions: Mapping[str, Tensor]) -> Tensor:
        """Return ``c Z x``, [..., I] -> [..., O]."""
        return F.linear(x, (self.scale * directions["delta"]).to(x.dtype))
