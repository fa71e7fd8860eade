"""IA3: every output channel is scaled.

    W = diag(1 + d) W0                  (IA3, arXiv 2205.05638, equation 1; d = l - 1)

Shapes: O = out_features, I = in_features.  d [O].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qaft.bases.base import LinearSpec, Matmul
from qaft.updates.base import ChannelChanges, Update
from qaft.updates.scaling import scaled


class IA3(Update):
    """``y = W0 x + d W0 x``; O trainables, and only ``W0 x`` is kept for backward.

    Args:
        spec: the layer to adapt.
    """

    formula = "diag(1 + d) W0"
    source = "IA3, arXiv 2205.05638"

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.outputs = nn.Parameter(torch.zeros(spec.out_features, dtype=spec.dtype))

    def forward(self, x: Tensor, base: Matmul) -> Tensor:
        """Return the updated output, [..., I] -> [..., O]."""
        return scaled(base(x), self.outputs)

    def tangent(self, x: Tensor, base: Matmul, directions: Mapping[str, Tensor]) -> Tensor:
        """Return ``z W0 x``, [..., I] -> [..., O]."""
        return base(x) * directions["outputs"].to(x.dtype)

    def merge(self, weight: Tensor) -> Tensor:
        """Return ``diag(1 + d) W0``, [O, I]."""
        return scaled(weight.T, self.outputs).T

    def channel_changes(self) -> ChannelChanges:
        """Return ``d`` of the outputs."""
        return ChannelChanges(outputs=self.outputs)
