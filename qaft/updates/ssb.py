"""SSB: every input and every output channel is scaled.

    W = diag(1 + d_out) W0 diag(1 + d_in)                       (See Further for PEFT, arXiv 2407.05417)

Source: loralib/layers_SSB.py of Chongjie-Si/Subspace-Tuning, with d = s - 1 so that weight decay pulls to the base.
In a basis that is rotated on the input side, it is the rotated channels that are scaled.

``tie`` leaves only what the rest of the model can absorb without a new weight: layers that read one norm share d_in (it
is a factor of the norm's weight), and layers that read what another linear writes have none (it is a factor of that
linear's d_out). What remains, d_out, is a factor of the rows, and of the scales of rows that are packed.

Shapes: O = out_features, I = in_features.  d_in [I], d_out [O].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qaft.bases.base import LinearSpec, Matmul
from qaft.updates.base import ChannelChanges, Update
from qaft.updates.scaling import scaled


class SSB(Update):
    """``y = (1 + d_out) W0 ((1 + d_in) x)``; O + I trainables, and ``x`` and an output are kept for backward.

    Args:
        spec: the layer to adapt.
        tie: one d_in for all layers that read the same norm, and none for the others.
    """

    formula = "diag(1 + d_out) W0 diag(1 + d_in)"
    source = "See Further for PEFT, arXiv 2407.05417"
    shared = ("inputs",)
    needs_all_readers = True

    inputs: nn.Parameter | None

    @classmethod
    def is_tied(cls, **options: object) -> bool:
        """Return ``tie``."""
        return bool(options.get("tie", False))

    def __init__(self, spec: LinearSpec, *, tie: bool = False) -> None:
        super().__init__()
        scales_inputs = not tie or spec.reads is not None
        inputs = nn.Parameter(torch.zeros(spec.in_features, dtype=spec.dtype)) if scales_inputs else None
        self.register_parameter("inputs", inputs)
        self.outputs = nn.Parameter(torch.zeros(spec.out_features, dtype=spec.dtype))

    def _scaled_inputs(self, x: Tensor) -> Tensor:
        return x if self.inputs is None else scaled(x, self.inputs)

    def forward(self, x: Tensor, base: Matmul) -> Tensor:
        """Return the updated output, [..., I] -> [..., O]."""
        return scaled(base(self._scaled_inputs(x)), self.outputs)

    def tangent(self, x: Tensor, base: Matmul, directions: Mapping[str, Tensor]) -> Tensor:
        """Return ``(1 + d_out) W0 (z_in x) + z_out W0 ((1 + d_in) x)``, [..., I] -> [..., O]."""
        terms = []
        if "inputs" in directions:
            terms.append(scaled(base(x * directions["inputs"].to(x.dtype)), self.outputs))
        if "outputs" in directions:
            terms.append(base(self._scaled_inputs(x)) * directions["outputs"].to(x.dtype))
        return torch.stack(terms).sum(0)

    def merge(self, weight: Tensor) -> Tensor:
        """Return ``diag(1 + d_out) W0 diag(1 + d_in)``, [O, I]."""
        return scaled(self._scaled_inputs(weight).T, self.outputs).T

    def channel_changes(self) -> ChannelChanges:
        """Return ``d_in`` and ``d_out``."""
        return ChannelChanges(inputs=self.inputs, outputs=self.outputs)
