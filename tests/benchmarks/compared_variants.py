"""What is compared: every update at its default and at two budgets of trained scalars that most of them can be set to.

Budgets are those of SSB and of LoRA with rank 8 on all linear layers: O + I and 8 (O + I) summed over the layers. An
update that cannot be set to a budget has no cell there: dense has one size, and so have the channel scalings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qaft.updates import UPDATES

BUDGETS = ("default", "small", "rank 8")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An update with its options.

    Attributes:
        name: in the table.
        kind: of the update.
        options: of the update.
        budgets: those that it is a cell of.
        lr: what its paper or the usual practice takes on small models; the middle of the sweep.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    budgets: tuple[str, ...]
    lr: float

    @property
    def exports(self) -> str:
        """What an adapter-mode export can hold without rounding to a grid."""
        return "LoRA, merged" if UPDATES[self.kind].has_low_rank() else "merged"


def _sift(rate: float, entries: str, *budgets: str) -> Variant:
    options = {"rate": rate, "entries": entries, "choose": "gradient"}
    name = "sift, 64-blocks" if entries == "block64" else "sift, entries"
    return Variant(name=name, kind="sift", options=options, budgets=budgets, lr=1e-3)


def _gsoft(block: int, *budgets: str, apart: bool = False) -> Variant:
    options = {"block": block, **({"share": False} if apart else {})}
    return Variant(name="gsoft", kind="gsoft", options=options, budgets=budgets, lr=8e-4)


def _rows(count: int, *budgets: str) -> Variant:
    return Variant(name="roco, rows", kind="roco", options={"rows": count}, budgets=budgets, lr=1e-3)


def _columns(count: int, *budgets: str) -> Variant:
    options = {"columns": count, "choose": "random"}
    return Variant(name="roco, columns", kind="roco", options=options, budgets=budgets, lr=1e-3)


def variants(size: Mapping[str, int], *, ties: bool) -> list[Variant]:
    """Return what is compared on a model, the defaults first.

    Args:
        size: of its linear layers: ``weights``, ``inputs`` and ``outputs``, summed.
        ties: whether layers that read one norm can share scalings and rotations; a budget is then met apart.
    """
    small = (size["inputs"] + size["outputs"]) / size["weights"]
    lora = {rank: {"rank": rank, "alpha": 2.0 * rank} for rank in (1, 8)}
    tied = Variant(name="ssb, tied", kind="ssb", options={"tie": True}, budgets=("default",), lr=5e-3)
    return [
        Variant(name="lowrank (LoRA)", kind="lowrank", options=lora[8], budgets=("default", "rank 8"), lr=5e-4),
        Variant(name="dense", kind="dense", budgets=("default",), lr=5e-5),
        _rows(4, "default"),
        _columns(4, "default"),
        Variant(name="linchain", kind="linchain", options=lora[8], budgets=("default", "rank 8"), lr=2.5e-4),
        Variant(name="ssb", kind="ssb", budgets=("default", "small"), lr=5e-3),
        _sift(0.01, "entry", "default"),
        _sift(0.01, "block64", "default"),
        _gsoft(32, "default"),
        Variant(name="ssl", kind="ssl", budgets=("default",), lr=5e-3),
        Variant(name="ia3", kind="ia3", budgets=("default",), lr=5e-3),
        *([tied] if ties else []),
        Variant(name="lowrank (LoRA)", kind="lowrank", options=lora[1], budgets=("small",), lr=5e-4),
        _rows(2, "small"),
        _columns(2, "small"),
        _sift(small, "entry", "small"),
        _sift(small, "block64", "small"),
        _gsoft(2, "small", apart=ties),
        Variant(name="linchain", kind="linchain", options=lora[1], budgets=("small",), lr=2.5e-4),
        _rows(16, "rank 8"),
        _columns(16, "rank 8"),
        _sift(8 * small, "entry", "rank 8"),
        _sift(8 * small, "block64", "rank 8"),
        _gsoft(16, "rank 8", apart=ties),
    ]


def selected(found: Iterable[Variant], names: Iterable[str]) -> list[Variant]:
    """Return the variants of the given names, or all when no name is given."""
    wanted = set(names)
    return [variant for variant in found if not wanted or variant.name in wanted]
