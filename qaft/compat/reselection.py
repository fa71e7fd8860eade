"""What ``qat.reselect_every`` excludes: all that cannot be turned into another basis while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qaft.compat.rule import Rule
from qaft.zero import zero_stage

if TYPE_CHECKING:
    from qaft.recipe import Recipe

TURNABLE = ("adamw", "sgd")
"""Optimizers whose state is one value per parameter: moments of a packed or factored state cannot be turned."""

_OUT = "leave qat.reselect_every out (rotations are then chosen once, from the base model)"


def _reselects(wrong: Callable[[Recipe], bool]) -> Callable[[Recipe], bool]:
    return lambda r: r.qat is not None and r.qat.reselect_every is not None and wrong(r)


RESELECTION: tuple[Rule, ...] = (
    Rule(
        "reselect_every x rotation other than adaptive",
        _reselects(lambda r: r.qat is not None and r.qat.rotation != "adaptive"),
        "only adaptive chooses rotations by measured errors",
        f"set qat.rotation to adaptive, or {_OUT}",
    ),
    Rule(
        "reselect_every x update other than dense",
        _reselects(lambda r: r.update.kind != "dense"),
        "what it trains (rows, entries, factors) has no counterpart in another basis, or none of its shape",
        f"set update.kind to dense, or {_OUT}",
    ),
    Rule(
        "reselect_every x zeroth-order source",
        _reselects(lambda r: r.gradient.kind != "backprop"),
        "its journal repeats a run without data, from which alone rotations can be chosen again",
        f"set gradient.kind to backprop, or {_OUT}",
    ),
    Rule(
        "reselect_every x packed or factored optimizer state",
        _reselects(lambda r: r.optim.name not in TURNABLE),
        "its moments are stored in blocks or factors and cannot be turned with the weights",
        f"set optim.name to adamw or sgd, or {_OUT}",
    ),
    Rule(
        "reselect_every x ZeRO 1 to 3",
        _reselects(lambda r: bool(zero_stage(r.train.deepspeed))),
        "the optimizer state is in flat partitions there, which cannot be turned",
        f"set train.deepspeed to null, or {_OUT}",
    ),
    Rule(
        "reselect_every x proximal",
        _reselects(lambda r: any(section.kind == "proximal" for section in r.regularize)),
        "it pulls to values of the basis in which the run began",
        f"set optim.weight_decay (the same pull for dense updates), or {_OUT}",
    ),
)
"""Rules of ``qat.reselect_every``."""
