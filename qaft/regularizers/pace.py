"""PACE: predictions must agree under multiplicative noise on what updates add.

    h_l(x) = h0_l(x) + Z_l * dh_l(x),    Z_l ~ N(1, sigma_l^2) for each sample and channel, the same for all tokens

    L = mean loss(f_1) + lambda mean over targets of ||f_1 - f_2||^2        f_1, f_2: logits under two draws of Z

sigma_l falls linearly with depth, from sigma in the first trained block to sigma / n in the last of n. Dropout masks
are equal in both passes. ``lazy_half``: every ``interval`` steps half of the rows are run twice, on the other steps all
rows once, with noise and without the second term; no step costs more than a plain one.

Source: PACE (arXiv 2409.17137), equations 9 to 11 and its lazy variant. With a quantizer dh_l is the change of the
quantized layer's output, so that the term is 0 at the start there too.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from qaft.layers.adapted import AdaptedLinear
from qaft.layers.passes import block_of, noisy
from qaft.regularizers.base import Passes, PassTerm

VARIANTS = ("exact", "lazy_half")


class Pace(PassTerm):
    """Consistency of the logits at the targets under noise on the updates.

    Args:
        weight: lambda. The square is summed over the vocabulary: large vocabularies want a small one.
        sigma: of the noise in the first trained block.
        variant: ``exact`` or ``lazy_half``.
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

    def prepare(self, layers: Mapping[str, AdaptedLinear]) -> None:
        """Give each layer the noise of its depth."""
        blocks = sorted({block_of(name) for name in layers})
        falling = {block: self.sigma * (len(blocks) - i) / len(blocks) for i, block in enumerate(blocks)}
        self.sigmas = {name: falling[block_of(name)] for name in layers}

    def rows(self, batch_size: int, step: int) -> int:
        """Return all rows, or half of them (at least one) when lazy_half compares."""
        return batch_size if self.variant == "exact" or not self._compares(step) else max(1, batch_size // 2)

    def first_pass(self, layers: Mapping[str, AdaptedLinear], seed: int) -> AbstractContextManager[Any]:
        """Return the context of the first draw."""
        return noisy(layers, self.sigmas, seed)

    def __call__(self, passes: Passes, step: int) -> Tensor:
        """Return ``lambda ||f_1 - f_2||^2``, summed over the targets; 0 on the steps between."""
        if not self._compares(step):
            return passes.hidden.new_zeros(())
        # The first pass has the seed itself.
        with noisy(passes.layers, self.sigmas, passes.seed + 1):
            other = passes.again()
        return self.weight * passes.over_logits(_squared_distance, passes.hidden, other)

    def _compares(self, step: int) -> bool:
        return self.variant == "exact" or step % self.interval == 0


def _squared_distance(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).square().sum()
