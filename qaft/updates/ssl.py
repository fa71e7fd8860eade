"""SSL: every input channel is scaled.

    W = W0 diag(1 + d)                  (See Further for PEFT, arXiv 2407.05417: W0 D in its y = x W layout is D1 W0)

Source: loralib/layers_SSL.py of Chongjie-Si/Subspace-Tuning, with d = s - 1 so that weight decay pulls to the base.
In a basis that is rotated on the input side, it is the rotated channels that are scaled.

Shapes: O = out_features, I = in_features.  d [I].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qaft.bases.base import LinearSpec, Matmul
from qaft.updates.base import ChannelChanges, Update
from qaft.updates.scaling import scaled


class SSL(Update):
    """``y = W0 (x + d x)``; I trainables, and only ``x`` is kept for backward.

    Args:
        spec: the layer to adapt.
    """

    formula = "W0 diag(1 + d)"
    source = "See Further for PEFT, arXiv 2407.05417"

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.inputs = nn.Parameter(torch.zeros(spec.in_features, dtype=spec.dtype))

    def forward(self, x: Tensor, base: Matmul) -> Tensor:
        """Return the updated output, [..., I] -> [..., O]."""
        return base(scaled(x, self.inputs))

    def tangent(self, x: Tensor, base: Matmul, directions: Mapping[str, Tensor]) -> Tensor:
        """Return ``W0 (z x)``, [..., I] -> [..., O]."""
        return base(x * directions["inputs"].to(x.dtype))

    def merge(self, weight: Tensor) -> Tensor:
        """Return ``W0 diag(1 + d)``, [O, I]."""
        return scaled(weight, self.inputs)

    def channel_changes(self) -> ChannelChanges:
        """Return ``d`` of the inputs."""
        return ChannelChanges(inputs=self.inputs)
