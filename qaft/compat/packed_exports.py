"""What checkpoints of bitsandbytes and of GPTQ cannot hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qaft.compat.exports import EXPORTABLE_BITS, GRID_BITS, PACKED_BNB, exports
from qaft.compat.rule import Rule
from qaft.sections import CODE_BOOK_KINDS

if TYPE_CHECKING:
    from qaft.recipe import Recipe

FORCED_STORAGES = {"bnb": (*CODE_BOOK_KINDS, "int8"), "gptq": ("int4", "int8_group")}
"""Storages whose grid the format has: an adapter can be put onto them by force."""


def _has_no_grid(recipe: Recipe, format: str) -> bool:
    """Return whether nothing is trained through a grid, and the export is not forced onto that of the storage."""
    forced = recipe.model.storage in FORCED_STORAGES[format]
    return recipe.qat is None and any(e.format == format and not (e.force and forced) for e in recipe.export)


def _is_code_book(recipe: Recipe) -> bool:
    return recipe.qat is not None and recipe.qat.weights.kind in CODE_BOOK_KINDS


def _is_int8(recipe: Recipe) -> bool:
    grid = recipe.qat and recipe.qat.weights
    if grid is None or grid.kind != "int" or grid.range == "signed_absmax":
        return False
    return grid.bits == 8 and grid.symmetric and grid.group_size in (None, -1)


def _has_other_width(recipe: Recipe) -> bool:
    storage = recipe.model.storage
    if _is_code_book(recipe):
        return storage in ("int8", *GRID_BITS)
    return _is_int8(recipe) and storage in (*CODE_BOOK_KINDS, "int4")


def _is_on_gptq_grid(recipe: Recipe) -> bool:
    return recipe.qat is not None and recipe.qat.weights.kind == "int" and recipe.qat.weights.bits in EXPORTABLE_BITS


def _has_other_grid(recipe: Recipe) -> bool:
    if recipe.qat is None:
        return False
    storage = recipe.model.storage
    return storage in PACKED_BNB or GRID_BITS.get(storage, recipe.qat.weights.bits) != recipe.qat.weights.bits


PACKED_EXPORTS: tuple[Rule, ...] = (
    Rule(
        "no qat x bnb export",
        lambda r: _has_no_grid(r, "bnb"),
        "an update that was not trained through a grid of bitsandbytes is rounded away when it is put onto one",
        "add a qat section with weights {kind: nf4}, {kind: fp4} or {bits: 8, group_size: null}, or export `merged` or "
        "`peft`",
    ),
    Rule(
        "grid that bitsandbytes lacks x bnb export",
        lambda r: r.qat is not None and not _is_code_book(r) and not _is_int8(r) and exports(r, "bnb"),
        "bitsandbytes has the code books nf4 and fp4, and int8 with one positive scale per output channel",
        "set qat.weights to {kind: nf4}, {kind: fp4} or {bits: 8, group_size: null}, or export `compressed-tensors`",
    ),
    Rule(
        "frozen layers of another width x bnb export",
        lambda r: _has_other_width(r) and exports(r, "bnb"),
        "transformers loads a checkpoint of bitsandbytes in 4 or in 8 bits, and here frozen and trained layers differ",
        "set model.storage to nf4, fp4 or bf16 for nf4 and fp4 grids, and to int8, int8_group or bf16 for int8 grids",
    ),
    Rule(
        "no qat x gptq export",
        lambda r: _has_no_grid(r, "gptq"),
        "an update that was not trained through the grid is rounded away when it is put onto it",
        "add a qat section with int weights of 4 or 8 bits, or export `merged` or `peft`",
    ),
    Rule(
        "grid without 4- or 8-bit integers x gptq export",
        lambda r: r.qat is not None and not _is_on_gptq_grid(r) and exports(r, "gptq"),
        "readers of GPTQ checkpoints support integers of 4 and 8 bits",
        "set qat.weights.kind to int and bits to 4 or 8, or export `merged`",
    ),
    Rule(
        "frozen layers on another grid x gptq export",
        lambda r: _has_other_grid(r) and exports(r, "gptq"),
        "transformers reads one grid for all packed layers of a GPTQ checkpoint",
        "set model.storage to int4 (bits 4), int8_group (bits 8) or bf16, or export `compressed-tensors`",
    ),
    Rule(
        "scales in fp32 x gptq export",
        lambda r: r.model.dtype == "float32" and exports(r, "gptq"),
        "GPTQ checkpoints hold scales in fp16, which would round those of training",
        "set model.dtype to bfloat16 or float16, or export `compressed-tensors`",
    ),
)
"""Rules of ``export`` for the formats bnb and gptq."""
