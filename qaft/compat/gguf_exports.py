"""What a GGUF file cannot hold: its types are blocks of 32 weights with a 16-bit scale and no zero point."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qaft.compat.rule import Rule
from qaft.sections import CODE_BOOK_KINDS

if TYPE_CHECKING:
    from qaft.recipe import Recipe

BLOCK = 32


def _writes(recipe: Recipe, *kinds: str) -> bool:
    """Return whether layers trained through a grid of one of these kinds are exported as gguf."""
    return (
        recipe.qat is not None and recipe.qat.weights.kind in kinds and any(e.format == "gguf" for e in recipe.export)
    )


def _has_odd_groups(recipe: Recipe) -> bool:
    size = None if recipe.qat is None else recipe.qat.weights.group_size
    return size not in (None, -1) and bool(size % BLOCK)


GGUF_EXPORTS: tuple[Rule, ...] = (
    Rule(
        "grid without a type x gguf export",
        lambda r: _writes(r, *CODE_BOOK_KINDS, "nvfp4"),
        "the types of GGUF that are written are Q4_0, Q8_0 and MXFP4",
        "set qat.weights.kind to q4_0, q8_0, mxfp4 or int, or export `merged`",
    ),
    Rule(
        "zero points x gguf export",
        lambda r: _writes(r, "int") and r.qat is not None and not r.qat.weights.symmetric,
        "Q4_0 and Q8_0 have none",
        "set qat.weights.symmetric to true (range signed_absmax uses all levels), or export `merged`",
    ),
    Rule(
        "groups that blocks do not fill x gguf export",
        lambda r: _writes(r, "int") and _has_odd_groups(r),
        f"a block of GGUF holds {BLOCK} weights",
        f"set qat.weights.group_size to a multiple of {BLOCK}, or export `merged`",
    ),
    Rule(
        "scales in fp32 x gguf export",
        lambda r: _writes(r, "int") and r.model.dtype == "float32",
        "scales of int grids are kept in model.dtype, and blocks of GGUF hold them in fp16",
        "set qat.weights.kind to q4_0 or q8_0, model.dtype to bfloat16 or float16, or export `merged`",
    ),
)
"""Rules of ``export`` of format ``gguf``."""
