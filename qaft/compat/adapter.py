"""What a run that starts from an adapter cannot be."""

from __future__ import annotations

from qaft.compat.rule import Rule
from qaft.compat.training import FIRST_ORDER

ADAPTER: tuple[Rule, ...] = (
    Rule(
        "model.adapter x update other than lowrank",
        lambda r: r.model.adapter is not None and r.update.kind != "lowrank",
        "the factors of the adapter are where the trained factors start, and other updates have none of that form",
        "set update.kind to lowrank, or merge the adapter in 16 bits and give the result as model.name",
    ),
    Rule(
        "model.adapter x zeroth-order source",
        lambda r: r.model.adapter is not None and r.gradient.kind not in FIRST_ORDER,
        "a journal rebuilds what was trained from the base model and its scalars alone",
        "set gradient.kind to backprop, or merge the adapter in 16 bits and give the result as model.name",
    ),
)
"""Rules of ``model.adapter``."""
