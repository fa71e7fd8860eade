"""``qaft list``: the registered parts, from their classes and docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from qaft.compat import CAUTIONS, INCOMPATIBLE
from qaft.errors import RecipeError
from qaft.registry import schema_of, suggest


def _registries() -> dict[str, Callable[[], Mapping[str, Any]]]:
    def load(module: str, name: str) -> Callable[[], Mapping[str, Any]]:
        return lambda: getattr(__import__(module, fromlist=[name]), name)

    return {
        "updates": load("qaft.updates", "UPDATES"),
        "quantizers": load("qaft.quant", "QUANTIZERS"),
        "rotations": load("qaft.rotation", "ROTATIONS"),
        "selectors": load("qaft.selection", "SELECTORS"),
        "sources": load("qaft.gradients", "SOURCES"),
        "regularizers": load("qaft.regularizers", "REGULARIZERS"),
        "exporters": load("qaft.export", "EXPORTERS"),
    }


def print_list(what: str) -> None:
    """Print one registry, or the table of incompatible choices.

    Raises:
        RecipeError: there is no such list.
    """
    registries = _registries()
    if what == "compat":
        _print_compat()
        return
    if what not in registries:
        allowed = [*registries, "compat"]
        raise RecipeError(f"list {what!r}: must be one of {', '.join(allowed)}{suggest(what, allowed)}")
    if what == "updates":
        # torch is imported for this list only.
        from qaft.commands.update_list import update_table

        Console().print(update_table())
        return
    table = Table("name", "what", "options", title=what)
    for name, cls in sorted(registries[what]().items()):
        options = (
            ", ".join(f"{n}={row['default']}" for n, row in schema_of(cls).items()) if inspect.isclass(cls) else ""
        )
        table.add_row(name, (inspect.getdoc(cls) or "").partition("\n")[0], options)
    Console().print(table)


def _print_compat() -> None:
    table = Table("choice", "reason", "instead", title="compat")
    for row in (*INCOMPATIBLE, *CAUTIONS):
        table.add_row(row.name, row.reason, row.instead)
    Console().print(table)
