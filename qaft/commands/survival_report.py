"""What survives of an adapter, as tables: by kind of layer, and the layers that lose most."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rich.table import Table

from qaft.export.survival import SMALLEST_SHARE, Survival, survival_table

_SHOWN = 5


def is_lost(row: Survival) -> bool:
    """Return whether a layer keeps too little of its update for an export without force."""
    return row.share is not None and not row.share >= SMALLEST_SHARE


def kind_table(rows: Sequence[Survival]) -> Table:
    """Return the layers by the last part of their name as a rich table; layers without an update are left out."""
    kinds: dict[str, list[Survival]] = {}
    for row in rows:
        if row.share is not None:
            kinds.setdefault(row.name.rpartition(".")[2], []).append(row)
    table = Table(
        *("kind", "layers", "update kept", "least", "error", f"below {SMALLEST_SHARE:.0%}"),
        title="what survives requantization",
        caption="error: of the requantized weight, relative to the size of the update",
    )
    for kind, found in kinds.items():
        shares = [row.share for row in found if row.share is not None]
        error, lost = fmean(row.error for row in found), sum(map(is_lost, found))
        table.add_row(kind, str(len(found)), f"{fmean(shares):.1%}", f"{min(shares):.1%}", f"{error:.3f}", str(lost))
    return table


def worst_table(rows: Sequence[Survival]) -> Table:
    """Return the few layers that keep least of their update as a rich table."""
    changed = sorted((row for row in rows if row.share is not None), key=lambda row: (row.share, row.name))
    table = survival_table(changed[:_SHOWN])
    table.title = f"the {min(_SHOWN, len(changed))} layers that keep least"
    return table
