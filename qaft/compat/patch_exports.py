"""What a patch cannot hold, and what the packed base that it lies on cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qaft.compat.exports import (
    EXPORTABLE_BITS,
    PACKED_BNB,
    exports,
    has_mixed_zero_points,
    has_odd_activations,
    has_zero_points_under_activations,
)
from qaft.compat.rule import Rule
from qaft.sections import CODE_BOOK_KINDS

if TYPE_CHECKING:
    from qaft.recipe import Recipe


def _touches_few_rows(recipe: Recipe) -> bool:
    columns = recipe.update.options.get("columns", 0)
    return recipe.update.kind == "sift" or (recipe.update.kind == "roco" and not columns)


def _patches(recipe: Recipe, *kinds: str) -> bool:
    """Return whether rows on a grid of one of these kinds are exported as a patch."""
    return recipe.qat is not None and recipe.qat.weights.kind in kinds and exports(recipe, "patch")


PATCH_EXPORTS: tuple[Rule, ...] = (
    Rule(
        "adapter x patch export",
        lambda r: r.qat is None and exports(r, "patch"),
        "rows that were not trained through the grid lose most of their update when they are packed",
        "add a qat section (rows are then trained through the grid), or export `peft` or `merged`",
    ),
    Rule(
        "update of every row x patch export",
        lambda r: not _touches_few_rows(r) and exports(r, "patch"),
        "a patch holds the rows that an update touches, and this one touches all; so does a trained column, which lies "
        "in a group of every row",
        "set update.kind to roco with rows and without columns, or to sift, or export `compressed-tensors` or `merged`",
    ),
    Rule(
        "grid without packed checkpoint x patch export",
        lambda r: r.qat is not None and exports(r, "patch") and not _patches(r, "int", *CODE_BOOK_KINDS),
        "a patch changes rows of a packed base, and those that are read here hold int, nf4 or fp4 codes",
        "set qat.weights.kind to int, nf4 or fp4, or export `merged`",
    ),
    Rule(
        "unpackable bit width x patch export",
        lambda r: _patches(r, "int") and r.qat is not None and r.qat.weights.bits not in EXPORTABLE_BITS,
        "the packed base of a patch is a compressed-tensors checkpoint, whose readers support 4 and 8 bits",
        "set qat.weights.bits to 4 or 8, or export `merged`",
    ),
    Rule(
        "frozen layers of bitsandbytes x patch of integers",
        lambda r: _patches(r, "int") and r.model.storage in PACKED_BNB,
        "no checkpoint holds layers of bitsandbytes beside packed integers, so the patch would have no base",
        "set model.storage to int4, int8_group or bf16, or qat.weights.kind to nf4 or fp4 with that storage",
    ),
    Rule(
        "frozen layers in 8 bits x patch of a code book",
        lambda r: _patches(r, *CODE_BOOK_KINDS) and r.model.storage in ("int8", "int8_group"),
        "transformers loads a checkpoint of bitsandbytes in 4 or in 8 bits, so the patch would have no base",
        "set model.storage to nf4, fp4 or bf16, or qat.weights to {bits: 8} with storage int8_group",
    ),
    Rule(
        "asymmetric or clipped activations x patch export",
        lambda r: _patches(r, "int") and has_odd_activations(r),
        "readers of the packed base round the inputs of a layer to symmetric integers over the whole range of a token",
        "set qat.activations to symmetric: true and clip: 1, or export `merged` (the trained weights alone)",
    ),
    Rule(
        "activations beside zero points x patch export",
        lambda r: _patches(r, "int") and has_zero_points_under_activations(r),
        "transformers unpacks a base with zero points while it loads it, and then does not quantize inputs",
        "set qat.weights.symmetric to true, or leave qat.activations out",
    ),
    Rule(
        "two grids with zero points x patch export",
        lambda r: _patches(r, "int") and has_mixed_zero_points(r),
        "frozen and trained layers lie on grids of different widths, and of a base with zero points transformers reads "
        "the first grid only",
        "set qat.weights.symmetric to true, or model.storage to int4 (bits 4), int8_group (bits 8) or bf16",
    ),
)
"""Rules of ``export`` for the format patch."""
