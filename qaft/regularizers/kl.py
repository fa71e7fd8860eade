"""Self-distillation: the trained model stays near the base model in what it predicts.

    R = lambda tau^2 mean over targets of KL(p_base || p_theta),    p = softmax(logits / tau)

The teacher is the same model with its updates taken off, so no second set of weights exists; it costs one forward pass.
``teacher: base`` is that model as it is quantized. ``teacher: fp`` takes the grids off too (of trained layers,
activations and KV cache; frozen layers stay packed): the usual distillation of quantization-aware training.

Source: the regularization term of OrthSR (arXiv 2407.08374), its "bypass" of the adapters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qaft.layers.activations import plain_activations
from qaft.layers.passes import showing
from qaft.regularizers.base import Passes, PassTerm

TEACHERS = ("base", "fp")


class KLToBase(PassTerm):
    """Kullback-Leibler divergence from the base model's predictions at the targets; OrthSR with ``gsoft`` on the MLP.

    Args:
        weight: lambda.
        temperature: tau.
        teacher: ``base``, or ``fp`` for the base without quantizers.

    Raises:
        ValueError: weight or temperature is not above 0, or the teacher is unknown.
    """

    def __init__(self, *, weight: float = 0.1, temperature: float = 1.0, teacher: str = "base") -> None:
        for name, value in (("weight", weight), ("temperature", temperature)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        if teacher not in TEACHERS:
            raise ValueError(f"teacher={teacher!r} must be one of {', '.join(TEACHERS)}")
        self.weight, self.temperature, self.teacher = weight, temperature, teacher

    def __call__(self, passes: Passes, step: int) -> Tensor:
        """Return ``lambda tau^2 KL``, summed over the targets."""
        with torch.no_grad():
            if self.teacher == "base":
                with showing(passes.layers, "base"):
                    taught = passes.again()
            else:
                with showing(passes.layers, "unquantized_base"), plain_activations(passes.model):
                    taught = passes.again()
        return self.weight * passes.over_logits(self._divergence, passes.hidden, taught)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = ((z / self.temperature).log_softmax(-1) for z in (student, teacher))
        return self.temperature**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True)
