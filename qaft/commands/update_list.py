"""``qaft list updates``: the updated weight, what is trained, what can be exported, and the source, from each class."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from qaft.bases.base import LinearSpec
from qaft.registry import schema_of
from qaft.updates import UPDATES
from qaft.updates.base import Update

_LAYERS, _WIDTH = 32, 4096
"""Of Llama-2-7B, whose q_proj and v_proj are [4096, 4096] and read the same norm."""


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
    query, value = (_update(cls, name) for name in ("q_proj", "v_proj"))
    if cls.is_tied(**cls.typical):
        value.tie_to(query)
    return _LAYERS * sum(parameter.numel() for parameter in {*query.parameters(), *value.parameters()})


def _update(cls: type[Update], name: str) -> Update:
    choice = cls.entry_choice(**cls.typical)
    places = None if choice is None else choice.first(_WIDTH * _WIDTH)
    spec = LinearSpec(name=name, out_features=_WIDTH, in_features=_WIDTH, places=places)
    return cls(spec, **cls.typical)


def _written(options: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _exports(cls: type[Update]) -> str:
    # Through a grid every update can be packed: what is written is the grid's codes.
    return "merged, packed with qat" + (", LoRA" if cls.has_low_rank() else "")
