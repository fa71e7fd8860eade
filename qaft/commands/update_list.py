"""``qaft list updates``: the updated weight, what is trained, what can be exported, and the source, from each class."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from qaft.bases.base import LinearSpec
from qaft.registry import schema_of
from qaft.updates import UPDATES
from qaft.updates.base import Update

QV_OF_LLAMA_2_7B = ((4096, 4096),) * 64
"""Shapes [O, I] of q_proj and v_proj in 32 layers."""


def update_table() -> Table:
    """Return one row for each registered update, all from its class."""
    table = Table("name", "weight", "trained (7B, q and v)", "exports", "options", "source", title="updates")
    for name, cls in sorted(UPDATES.items()):
        options = ", ".join(f"{option}={row['default']}" for option, row in schema_of(cls).items())
        counted = f"{num_trainable(cls):,}" + (f" ({_written(cls.typical)})" if cls.typical else "")
        table.add_row(name, cls.formula, counted, _exports(cls), options, cls.source)
    return table


def num_trainable(cls: type[Update]) -> int:
    """Return what an update with its typical options trains on q_proj and v_proj of Llama-2-7B."""
    counts = {shape: _update(cls, *shape).num_trainable() for shape in set(QV_OF_LLAMA_2_7B)}
    return sum(counts[shape] for shape in QV_OF_LLAMA_2_7B)


def _update(cls: type[Update], out_features: int, in_features: int) -> Update:
    choice = cls.entry_choice(**cls.typical)
    places = None if choice is None else choice.first(out_features * in_features)
    spec = LinearSpec(name="q_proj", out_features=out_features, in_features=in_features, places=places)
    return cls(spec, **cls.typical)


def _written(options: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _exports(cls: type[Update]) -> str:
    # Through a grid every update can be packed: what is written is the grid's codes.
    return "merged, packed with qat" + (", LoRA" if cls.has_low_rank() else "")
