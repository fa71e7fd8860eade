"""Self-distillation: the trained model stays near the base model in what it predicts.

    R = lambda tau^2 mean over targets of KL(p_base || p_theta),    p = softmax(logits / tau)

The teacher is the same model with its updates taken off, so no second set of weights exists; it costs one forward pass.
``teacher: base`` is that model as it is quantized. ``teacher: fp`` takes the grids off too (of trained layers,
activations and KV cache; frozen layers stay packed): the usual distillation of quantization-aware training.

Source: the regularization term of OrthSR (arXiv 2407.08374), its "bypass" of the adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaft.layers.inputs import LayerInput
from qaft.layers.passes import showing
from qaft.models.attention import AttentionInputs
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
                with showing(passes.layers, "unquantized_base"), without_grids(passes.model):
                    taught = passes.again()
        return self.weight * passes.over_logits(self._divergence, passes.hidden, taught)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = ((z / self.temperature).log_softmax(-1) for z in (student, teacher))
        return self.temperature**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True)


@contextmanager
def without_grids(model: nn.Module) -> Iterator[None]:
    """Run the block with activations and the KV cache unquantized; rotations stay."""
    held: list[tuple[nn.Module, str, nn.Module]] = []
    for module in model.modules():
        leaves = {LayerInput: ("quantizer",), AttentionInputs: ("key", "value")}.get(type(module), ())
        held += [(module, leaf, grid) for leaf in leaves if (grid := getattr(module, leaf)) is not None]
    for module, leaf, _ in held:
        setattr(module, leaf, None)
    try:
        yield
    finally:
        for module, leaf, grid in held:
            setattr(module, leaf, grid)
