"""The step of a probe against the rounding of the loss.

A difference d(e) = l(+e) - l(-e) is linear in e but for terms of the third order, so what is left of
d(2e) - 2 d(e) is rounding:

    signal^2 = mean_i d_i(e)^2,    rounding^2 = mean_i (d_i(2e) - 2 d_i(e))^2 / 5,    ratio = signal / rounding

The smallest power of two with a ratio of 30 is chosen: powers of two are exact in every dtype, and larger steps only
add curvature (which counts as rounding here, so that the ratio falls again).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qaft.errors import TrainingError

WANTED_RATIO = 30.0
DROWNED_RATIO = 2.0
"""Below this more than a tenth of the variance of c is rounding, whatever the batch says."""

_LADDER = tuple(2.0**-k for k in range(13, 2, -1))

Differences = Callable[[float], Tensor]
"""Returns the differences of this rank's examples at an epsilon, [N]."""

SumOverRanks = Callable[[list[float]], list[float]]


@dataclass(frozen=True)
class Epsilon:
    """A step and the ratio of loss difference to rounding that was measured there; infinite for no rounding seen."""

    value: float
    ratio: float


def check_epsilon(epsilon: float, differences: Differences, sum_over_ranks: SumOverRanks) -> Epsilon:
    """Return the measured ratio of a given epsilon.

    Raises:
        TrainingError: the differences are rounding.
    """
    ratio = _ratio(differences(epsilon), differences(2 * epsilon), sum_over_ranks)
    if not ratio >= DROWNED_RATIO:
        raise TrainingError(
            f"gradient.epsilon={epsilon:g}: the loss difference of a probe is {ratio:.2g} times its rounding (for "
            f"a large epsilon: its curvature), so the steps would be noise: at least {DROWNED_RATIO:g} is needed, "
            f"{WANTED_RATIO:g} is good; set gradient.epsilon to auto, or model.dtype to float32"
        )
    return Epsilon(epsilon, ratio)


def choose_epsilon(differences: Differences, sum_over_ranks: SumOverRanks) -> Epsilon:
    """Return the smallest epsilon with the wanted ratio, or the one with the largest ratio.

    Raises:
        TrainingError: at every epsilon the differences are rounding.
    """
    best, at = Epsilon(_LADDER[0], 0.0), differences(_LADDER[0])
    for epsilon in _LADDER:
        doubled = differences(2 * epsilon)
        ratio = _ratio(at, doubled, sum_over_ranks)
        if ratio > best.ratio:
            best = Epsilon(epsilon, ratio)
        if ratio >= WANTED_RATIO:
            break
        at = doubled
    if not best.ratio >= DROWNED_RATIO:
        raise TrainingError(
            f"gradient.epsilon=auto: no step from {_LADDER[0]:g} to {_LADDER[-1]:g} changes the loss by more than "
            f"{best.ratio:.2g} times its rounding; set model.dtype to float32, or look whether the data has targets"
        )
    return best


def _ratio(at: Tensor, doubled: Tensor, sum_over_ranks: SumOverRanks) -> float:
    signal, rounding = sum_over_ranks([float(at.square().sum()), float((doubled - 2 * at).square().sum()) / 5])
    if not signal > 0:
        return 0.0
    return math.sqrt(signal / rounding) if rounding > 0 else math.inf
