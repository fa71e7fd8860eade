"""Optimizers by the name a recipe uses; the only importer of bitsandbytes on the training side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from qaft.errors import RecipeError
from qaft.sections import OptimSection
from qaft.train.multiplicative import MultiplicativeAdam

Groups = list[dict[str, Any]]


def _adamw(groups: Groups, section: OptimSection) -> Optimizer:
    # fused: one kernel, and none of the temporaries of parameter size that foreach makes; exists for CPU and GPU.
    return AdamW(groups, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay, fused=True)


def _sgd(groups: Groups, section: OptimSection) -> Optimizer:
    return SGD(groups, lr=section.lr, momentum=section.momentum, weight_decay=section.weight_decay, fused=True)


def _adafactor(groups: Groups, section: OptimSection) -> Optimizer:
    return Adafactor(groups, lr=section.lr, weight_decay=section.weight_decay)


def _multiplicative(groups: Groups, section: OptimSection) -> Optimizer:
    options = {name: getattr(section, name) for name in ("betas", "eps", "inner", "additive", "weight_decay")}
    return MultiplicativeAdam(groups, **options)


def _bitsandbytes_adamw(class_name: str) -> Callable[[Groups, OptimSection], Optimizer]:
    def build(groups: Groups, section: OptimSection) -> Optimizer:
        import bitsandbytes.optim

        build_adamw = getattr(bitsandbytes.optim, class_name)
        return build_adamw(groups, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay)

    return build


OPTIMIZERS: dict[str, Callable[[Groups, OptimSection], Optimizer]] = {
    "adafactor": _adafactor,
    "adamw": _adamw,
    "adamw_8bit": _bitsandbytes_adamw("AdamW8bit"),
    "multiplicative": _multiplicative,
    "paged_adamw": _bitsandbytes_adamw("PagedAdamW"),
    "paged_adamw_8bit": _bitsandbytes_adamw("PagedAdamW8bit"),
    "sgd": _sgd,
}
"""Builders, by the name that a recipe uses."""

STATE_BYTES: dict[str, int] = {
    "adafactor": 0,
    "adamw": 8,
    "adamw_8bit": 2,
    "multiplicative": 8,
    "paged_adamw": 8,
    "paged_adamw_8bit": 2,
    "sgd": 0,
}
"""Bytes of state per trained fp32 scalar, without scales and steps (adafactor: rows, columns; sgd: 4 with momentum)."""

_ADAM = frozenset({"betas", "eps"})
_OPTIONS: Mapping[str, frozenset[str]] = {
    "adafactor": frozenset(),
    "adamw": _ADAM,
    "adamw_8bit": _ADAM,
    "multiplicative": _ADAM | {"inner", "additive"},
    "paged_adamw": _ADAM,
    "paged_adamw_8bit": _ADAM,
    "sgd": frozenset({"momentum"}),
}
_NEEDS_CUDA = frozenset({"paged_adamw", "paged_adamw_8bit"})


def make_optimizer(groups: Groups, section: OptimSection, device: torch.device) -> Optimizer:
    """Return the optimizer ``section.name`` over ``groups`` (see ``param_groups``); each group keeps its own ``lr``.

    Args:
        groups: torch parameter groups with ``lr``.
        section: name and options.
        device: where the parameters will be stepped.

    Raises:
        RecipeError: an option was set that this optimizer does not use, or it does not run on ``device``.
    """
    for option in ("betas", "eps", "momentum", "inner", "additive"):
        given = getattr(section, option)
        if option not in _OPTIONS[section.name] and given != OptimSection.model_fields[option].default:
            users = sorted(name for name, options in _OPTIONS.items() if option in options)
            raise RecipeError(
                f"optim.{option}={given} is not used by {section.name}: remove it, or set optim.name to "
                f"{' or '.join(users)}"
            )
    if section.name in _NEEDS_CUDA and device.type != "cuda":
        # bitsandbytes itself falls back to a plain optimizer there; the memory that was planned for would be wrong.
        runs_here = sorted(set(OPTIMIZERS) - _NEEDS_CUDA)
        raise RecipeError(
            f"optim.name={section.name} pages its state between GPU and host and needs CUDA; "
            f"on {device.type} these run: {', '.join(runs_here)}"
        )
    return OPTIMIZERS[section.name](groups, section)
