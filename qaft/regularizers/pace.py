"""PACE: predictions must agree under multiplicative noise on what updates add.

    h_l(x) = h0_l(x) + Z_l * dh_l(x),    Z_l ~ N(1, sigma_l^2) for each sample and channel, the same for all tokens

    L = mean loss(f_1) + lambda mean over targets of ||f_1 - f_2||^2        f_1, f_2: logits under two draws of Z

sigma_l falls linearly with depth, from sigma in the first trained block to sigma / n in the last of n. Dropout masks
are equal in both passes. ``lazy_half``: every ``interval`` steps half of the rows are run twice, on the other steps all
rows once, with noise and without the second term; no step costs more than a plain one. ``fast``: f_2 is what the sample
gave when it was seen last (in the epoch before), so that every step has both terms for one pass; the first time, a
sample has the loss alone.

Source: PACE (arXiv 2409.17137), equations 9 to 11 and its lazy and fast variants. With a quantizer dh_l is the change
of the quantized layer's output, so that the term is 0 at the start there too.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from qaft.layers.adapted import AdaptedLinear
from qaft.layers.passes import block_of, noisy
from qaft.regularizers.base import Passes, PassTerm
from qaft.regularizers.memory import TargetMemory

VARIANTS = ("exact", "fast", "lazy_half")


class Pace(PassTerm):
    """Consistency of the logits at the targets under noise on the updates.

    Args:
        weight: lambda. The square is summed over the vocabulary: large vocabularies want a small one.
        sigma: of the noise in the first trained block.
        variant: ``exact``, ``fast`` or ``lazy_half``.
        interval: N, lazy_half only: steps from one comparison to the next.

    Raises:
        ValueError: weight is not above 0, sigma is negative, or a name or interval is not allowed.
    """

    def __init__(
        self, *, weight: float = 0.1, sigma: float = 0.5, variant: str = "lazy_half", interval: int = 2
    ) -> None:
        if not weight > 0:
            raise ValueError(f"weight={weight} must be above 0; leave the regularizer out for none")
        if not sigma >= 0:
            raise ValueError(f"sigma={sigma} must be at least 0; the paper tries 0.1 to 2")
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} must be one of {', '.join(VARIANTS)}")
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1")
        self.weight, self.sigma = weight, sigma
        self.variant, self.interval = variant, interval
        self.sigmas: dict[str, float] = {}
        self._memory = TargetMemory()

    @property
    def remembers_samples(self) -> bool:
        """Whether a sample is compared with its last pass."""
        return self.variant == "fast"

    def prepare(self, layers: Mapping[str, AdaptedLinear]) -> None:
        """Give each layer the noise of its depth."""
        blocks = sorted({block_of(name) for name in layers})
        falling = {block: self.sigma * (len(blocks) - i) / len(blocks) for i, block in enumerate(blocks)}
        self.sigmas = {name: falling[block_of(name)] for name in layers}

    def rows(self, batch_size: int, step: int) -> int:
        """Return all rows, or half of them (at least one) when lazy_half compares."""
        halves = self.variant == "lazy_half" and self._compares(step)
        return max(1, batch_size // 2) if halves else batch_size

    def first_pass(self, layers: Mapping[str, AdaptedLinear], seed: int) -> AbstractContextManager[Any]:
        """Return the context of the first draw."""
        return noisy(layers, self.sigmas, seed)

    def __call__(self, passes: Passes, step: int) -> Tensor:
        """Return ``lambda ||f_1 - f_2||^2``, summed over the targets; 0 on the steps between."""
        if self.variant == "fast":
            return self._from_last_pass(passes, step)
        if not self._compares(step):
            return passes.hidden.new_zeros(())
        # The first pass has the seed itself.
        with noisy(passes.layers, self.sigmas, passes.seed + 1):
            other = passes.again()
        return self.weight * passes.over_logits(_squared_distance, passes.hidden, other)

    def _from_last_pass(self, passes: Passes, step: int) -> Tensor:
        before, known = self._memory.exchange(passes.input_ids, passes.labels, passes.hidden, step)
        return self.weight * passes.over_logits(_squared_distance, passes.hidden[known], before[known])

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return what ``fast`` remembers of the samples."""
        return self._memory.state_dict(step) if self.remembers_samples else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``fast`` remembers."""
        if self.remembers_samples:
            self._memory.load_state_dict(state)

    def _compares(self, step: int) -> bool:
        return self.variant == "exact" or step % self.interval == 0


def _squared_distance(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).square().sum()
