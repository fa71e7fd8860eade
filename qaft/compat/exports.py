"""What an export format cannot hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qaft.compat.rule import Rule

if TYPE_CHECKING:
    from qaft.recipe import Recipe

PACKED_BNB = ("nf4", "fp4", "int8")
EXPORTABLE_BITS = (4, 8)

UNBOUNDED_RANK = ("dense", "gsoft", "ia3", "sift", "ssb", "ssl")
"""Updates that are no product of two thin factors."""

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


EXPORTS: tuple[Rule, ...] = (
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
        "grid other than int x compressed-tensors export",
        lambda r: r.qat is not None and r.qat.weights.kind != "int" and _exports(r, "compressed-tensors"),
        "the packed format that is written holds affine integers only",
        "set qat.weights.kind to int, or export `merged`, whose 16-bit weights hold every grid's values",
    ),
    Rule(
        "quantized activations x compressed-tensors export",
        lambda r: r.qat is not None and r.qat.activations is not None and _exports(r, "compressed-tensors"),
        "the file would say that activations are 16 bits, and its readers would not quantize them as in training",
        "export `merged` (the trained weights, to be served with quantized activations), or leave qat.activations out",
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
        "update of any rank x peft export",
        lambda r: r.update.kind in UNBOUNDED_RANK and _exports(r, "peft"),
        "a LoRA file holds updates of bounded rank only",
        "export `merged` (or `compressed-tensors` with qat), or set update.kind to lowrank, linchain, roco or bank",
    ),
    Rule(
        "simulation target x export",
        lambda r: r.qat is not None and r.qat.target == "simulation" and bool(r.export),
        "with this target the model may rotate activations in ways that no program that loads an export does",
        "set qat.target to portable or vllm, or leave out export",
    ),
    Rule(
        "online rotation of down x export",
        lambda r: (
            r.qat is not None
            and r.qat.target == "vllm"
            and r.qat.activations is not None
            and r.qat.rotation != "none"
            and bool(r.export)
        ),
        "no exporter here writes the input transform of down_proj, and transformers would ignore it",
        "set qat.target to portable",
    ),
)
"""Rules of ``export``."""
