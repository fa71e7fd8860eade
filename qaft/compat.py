"""The few pairs of choices that exclude each other, as one table with reasons; no pair-``if`` anywhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qaft.errors import IncompatibleError

if TYPE_CHECKING:
    from qaft.recipe import Recipe

PACKED_BNB = ("nf4", "fp4", "int8")
EXPORTABLE_BITS = (4, 8)


@dataclass(frozen=True)
class Rule:
    """One row: when it applies, why it does not work, what to do instead."""

    name: str
    applies: Callable[[Recipe], bool]
    reason: str
    instead: str


GRID_BITS = {"int4": 4, "int8_group": 8}
"""Bits of the storages on an affine grid; group size and zero points are those of ``qat.weights``."""


def _exports(recipe: Recipe, format: str) -> bool:
    return any(e.format == format for e in recipe.export)


def _requantizes(recipe: Recipe) -> bool:
    """Return whether a packed export is asked for without ``force``, or with it but without a grid to force onto."""
    has_grid = recipe.model.storage in GRID_BITS or (recipe.qat is not None and recipe.qat.weights.kind == "int")
    return any(e.format == "compressed-tensors" and not (e.force and has_grid) for e in recipe.export)


def _has_mixed_zero_points(recipe: Recipe) -> bool:
    grid, bits = recipe.qat and recipe.qat.weights, GRID_BITS.get(recipe.model.storage)
    return grid is not None and grid.kind == "int" and not grid.symmetric and bits not in (None, grid.bits)


INCOMPATIBLE: tuple[Rule, ...] = (
    Rule(
        "bitsandbytes storage x compressed-tensors export",
        lambda r: r.model.storage in PACKED_BNB and _requantizes(r),
        "the frozen layers would be quantized a second time, onto another grid than the one they are trained on",
        "set model.storage to int4 or int8_group (the export's own grid), or export `merged` or `peft`",
    ),
    Rule(
        "adapter on a packed base x compressed-tensors export",
        lambda r: r.model.storage in GRID_BITS and r.qat is None and _requantizes(r),
        "merging an update that was not trained through the grid back onto it erases most of the update",
        "add a qat section (the update is then trained through the grid), or export `merged` or `peft`",
    ),
    Rule(
        "code-book grid x compressed-tensors export",
        lambda r: r.qat is not None and r.qat.weights.kind != "int" and _exports(r, "compressed-tensors"),
        "the packed format holds affine integers only",
        "set qat.weights.kind to int, or export `merged`",
    ),
    Rule(
        "unpackable bit width x compressed-tensors export",
        lambda r: (
            r.qat is not None
            and r.qat.weights.kind == "int"
            and r.qat.weights.bits not in EXPORTABLE_BITS
            and _exports(r, "compressed-tensors")
        ),
        "readers of the packed format support 4 and 8 bits",
        "set qat.weights.bits to 4 or 8, or export `merged`",
    ),
    Rule(
        "two grids with zero points x compressed-tensors export",
        lambda r: _has_mixed_zero_points(r) and _exports(r, "compressed-tensors"),
        "frozen and trained layers lie on grids of different widths, and of files with zero points transformers reads "
        "the first grid only",
        "set qat.weights.symmetric to true, or model.storage to int4 (bits 4), int8_group (bits 8) or bf16, or export "
        "`merged`",
    ),
    Rule(
        "int4 storage x code-book grid",
        lambda r: r.model.storage == "int4" and r.qat is not None and r.qat.weights.kind != "int",
        "storage int4 takes its grid from qat.weights, which is a code book here",
        "set model.storage to nf4, or qat.weights.kind to int",
    ),
    Rule(
        "int4 storage x another bit width",
        lambda r: r.model.storage == "int4" and r.qat is not None and r.qat.weights.bits != 4,
        "storage int4 takes its grid from qat.weights, which has another width",
        "set qat.weights.bits to 4, or model.storage to int8_group (8 bits) or bf16",
    ),
    Rule(
        "dense update x peft export",
        lambda r: r.update.kind == "dense" and _exports(r, "peft"),
        "a LoRA file holds updates of bounded rank only",
        "export `merged`, or set update.kind to lowrank or roco",
    ),
    Rule(
        "double quantization x storage without block scales",
        lambda r: r.model.double_quant and r.model.storage not in ("nf4", "fp4"),
        "only nf4 and fp4 have block scales to quantize again",
        "set model.double_quant to false, or model.storage to nf4 or fp4",
    ),
)

CAUTIONS: tuple[Rule, ...] = (
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
