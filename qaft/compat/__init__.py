"""The few pairs of choices that exclude each other, as one table with reasons; no pair-``if`` anywhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qaft.compat.adapter import ADAPTER
from qaft.compat.exports import EXPORTS
from qaft.compat.gguf_exports import GGUF_EXPORTS
from qaft.compat.grids import GRIDS
from qaft.compat.packed_exports import PACKED_EXPORTS
from qaft.compat.patch_exports import PATCH_EXPORTS
from qaft.compat.reselection import RESELECTION
from qaft.compat.rule import Rule
from qaft.compat.training import FIRST_ORDER, TRAINING
from qaft.errors import IncompatibleError

if TYPE_CHECKING:
    from qaft.recipe import Recipe

INCOMPATIBLE: tuple[Rule, ...] = (
    *ADAPTER,
    *EXPORTS,
    *GGUF_EXPORTS,
    *GRIDS,
    *PACKED_EXPORTS,
    *PATCH_EXPORTS,
    *RESELECTION,
    *TRAINING,
)

CAUTIONS: tuple[Rule, ...] = (
    Rule(
        "zeroth-order source x clipping",
        lambda r: r.gradient.kind not in FIRST_ORDER and r.optim.clip is not None and r.optim.name == "sgd",
        "the norm of an estimate is |c| times the root of the number of parameters probed, far above optim.clip="
        "1: every step would have the same length",
        "set optim.clip to null; gradient.outlier masks what is too large",
    ),
    Rule(
        "dense update x lr_scale >= 2",
        lambda r: r.update.kind == "dense" and any(v >= 2 for v in r.optim.lr_scale.values()),
        "full QV updates collapse at ratios of 2 and more (arXiv 2410.02247, table 2)",
        "use a factor of 1 for dense updates; 4 is the paper's choice for lowrank",
    ),
)


def check_compatible(recipe: Recipe) -> None:
    """Raise for the first incompatibility that applies.

    Raises:
        IncompatibleError: the message holds the reason and the ways out.
    """
    for row in INCOMPATIBLE:
        if row.applies(recipe):
            raise IncompatibleError(f"{row.name}: {row.reason}; {row.instead}")


def cautions(recipe: Recipe) -> list[str]:
    """Return what is legal but known to go wrong, with the remedy."""
    return [f"{row.name}: {row.reason}; {row.instead}" for row in CAUTIONS if row.applies(recipe)]


__all__ = ["CAUTIONS", "INCOMPATIBLE", "Rule", "cautions", "check_compatible"]
