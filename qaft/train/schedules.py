"""Learning-rate schedules as one factor per step, so that the ratio of any two groups survives every step.

    t < w:   f(t) = (t + 1) / (w + 1)
    t >= w:  f(t) = m + (1 - m) g((t - w) / (T - w)),    g(x) = (1 + cos(pi x)) / 2  |  1 - x  |  1

with w warm-up steps (none has rate 0), T steps in all, floor m = ``min_lr``, and g for cosine | linear | constant.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qaft.errors import RecipeError
from qaft.sections import OptimSection


def warmup_steps(section: OptimSection, total_steps: int) -> int:
    """Return w: ``section.warmup`` itself from 1 on, else that fraction of ``total_steps``, rounded.

    Raises:
        RecipeError: the warm-up is not shorter than the run, or is a number of steps with a fraction.
    """
    if section.warmup < 1:
        return min(round(section.warmup * total_steps), total_steps - 1)
    if section.warmup != int(section.warmup) or section.warmup >= total_steps:
        raise RecipeError(
            f"optim.warmup={section.warmup:g}: must be a fraction below 1, or a whole number of steps "
            f"below train.steps={total_steps}"
        )
    return int(section.warmup)


def schedule_factor(step: int, section: OptimSection, total_steps: int) -> float:
    """Return f(step) in (0, 1] (0 only at ``step == total_steps``, which is never trained), for steps from 0."""
    warmup = warmup_steps(section, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / (total_steps - warmup))
    decay = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "constant": 1.0,
    }[section.schedule]
    return section.min_lr + (1 - section.min_lr) * decay


def make_scheduler(optimizer: Optimizer, section: OptimSection, total_steps: int) -> LambdaLR:
    """Return a scheduler that multiplies each group's own initial learning rate by ``schedule_factor``.

    Raises:
        RecipeError: see ``warmup_steps``.
    """
    # A scheduler that broadcasts one maximum rate to all groups would silently erase lr_scale.
    return LambdaLR(optimizer, lambda step: schedule_factor(step, section, total_steps))
