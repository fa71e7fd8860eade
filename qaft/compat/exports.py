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

SCALINGS = ("ia3", "ssb", "ssl")
"""Updates that scale channels: they fold into norms and scales, and no code changes."""

GRID_BITS = {"int4": 4, "int8_group": 8}
"""Bits of the storages on an affine grid; group size and zero points are those of ``qat.weights``."""


def exports(recipe: Recipe, format: str) -> bool:
    """Return whether an export has this format."""
    return any(e.format == format for e in recipe.export)


def _is_cut(recipe: Recipe) -> bool:
    """Return whether every adapter file of a dense update names the rank it is cut to."""
    return recipe.update.kind == "dense" and all(e.rank is not None for e in recipe.export if e.format == "peft")


def _requantizes(recipe: Recipe) -> bool:
    """Return whether a packed export is asked for without ``force``, or with it but without a grid to force onto."""
    has_grid = recipe.model.storage in GRID_BITS or (recipe.qat is not None and recipe.qat.weights.kind == "int")
    return any(e.format == "compressed-tensors" and not (e.force and has_grid) for e in recipe.export)


def has_mixed_zero_points(recipe: Recipe) -> bool:
    """Return whether frozen and trained layers are integers of different widths, with zero points."""
    grid, bits = recipe.qat and recipe.qat.weights, GRID_BITS.get(recipe.model.storage)
    return grid is not None and grid.kind == "int" and not grid.symmetric and bits not in (None, grid.bits)


def has_odd_activations(recipe: Recipe) -> bool:
    """Return whether inputs are rounded otherwise than to symmetric integers over the whole range of a token."""
    grid = recipe.qat and recipe.qat.activations
    return grid is not None and (not grid.symmetric or grid.clip < 1)


def has_zero_points_under_activations(recipe: Recipe) -> bool:
    """Return whether inputs of layers with zero points are quantized."""
    return recipe.qat is not None and recipe.qat.activations is not None and not recipe.qat.weights.symmetric


EXPORTS: tuple[Rule, ...] = (
    Rule(
        "bitsandbytes storage x compressed-tensors export",
        lambda r: r.model.storage in PACKED_BNB and _requantizes(r),
        "the frozen layers would be quantized a second time, onto another grid than the one they are trained on",
        "set model.storage to int4 or int8_group (the export's own grid), or export `merged` or `peft`",
    ),
    Rule(
        "adapter on a packed base x compressed-tensors export",
        lambda r: r.model.storage in GRID_BITS and r.qat is None and _requantizes(r) and r.update.kind not in SCALINGS,
        "merging an update that was not trained through the grid back onto it erases most of the update",
        "add a qat section (the update is then trained through the grid), or set update.kind to ssb with tie: true or "
        "to ia3 (scalings fold into scales), or export `merged` or `peft`",
    ),
    Rule(
        "grid other than int x compressed-tensors export",
        lambda r: r.qat is not None and r.qat.weights.kind != "int" and exports(r, "compressed-tensors"),
        "the packed format that is written holds affine integers only",
        "set qat.weights.kind to int, or export `merged`, whose 16-bit weights hold every grid's values",
    ),
    Rule(
        "asymmetric or clipped activations x compressed-tensors export",
        lambda r: has_odd_activations(r) and exports(r, "compressed-tensors"),
        "its readers round the inputs of a layer to symmetric integers over the whole range of a token",
        "set qat.activations to symmetric: true and clip: 1, or export `merged` (the trained weights alone)",
    ),
    Rule(
        "activations beside zero points x compressed-tensors export",
        lambda r: has_zero_points_under_activations(r) and exports(r, "compressed-tensors"),
        "weights with zero points are unpacked by transformers while it loads them, after which it does not quantize "
        "the inputs of the layer",
        "set qat.weights.symmetric to true, or leave qat.activations out",
    ),
    Rule(
        "unpackable bit width x compressed-tensors export",
        lambda r: (
            r.qat is not None
            and r.qat.weights.kind == "int"
            and r.qat.weights.bits not in EXPORTABLE_BITS
            and exports(r, "compressed-tensors")
        ),
        "readers of the packed format support 4 and 8 bits",
        "set qat.weights.bits to 4 or 8, or export `merged`",
    ),
    Rule(
        "two grids with zero points x compressed-tensors export",
        lambda r: has_mixed_zero_points(r) and exports(r, "compressed-tensors"),
        "frozen and trained layers lie on grids of different widths, and of files with zero points transformers reads "
        "the first grid only",
        "set qat.weights.symmetric to true, or model.storage to int4 (bits 4), int8_group (bits 8) or bf16, or export "
        "`merged`",
    ),
    Rule(
        "update of any rank x peft export",
        lambda r: r.update.kind in UNBOUNDED_RANK and not _is_cut(r) and exports(r, "peft"),
        "a LoRA file holds updates of bounded rank only",
        "export `merged` (or `compressed-tensors` with qat), or set update.kind to lowrank, linchain, roco or bank, or "
        "export.rank for a dense update, of which the file then holds the part of that rank",
    ),
    Rule(
        "simulation target x export",
        lambda r: r.qat is not None and r.qat.target == "simulation" and bool(r.export),
        "with this target the model may rotate activations in ways that no program that loads an export does",
        "set qat.target to portable or vllm, or leave out export",
    ),
    Rule(
        "online rotation of down x export without transforms",
        lambda r: (
            r.qat is not None
            and r.qat.target == "vllm"
            and r.qat.activations is not None
            and r.qat.rotation != "none"
            and any((e.format, e.profile) != ("compressed-tensors", "vllm") for e in r.export)
        ),
        "only compressed-tensors with profile vllm holds the input transform of down_proj",
        "set qat.target to portable, or export {format: compressed-tensors, profile: vllm} alone",
    ),
    Rule(
        "profile vllm x format other than compressed-tensors",
        lambda r: any(e.profile == "vllm" and e.format != "compressed-tensors" for e in r.export),
        "a profile says whether a compressed-tensors folder may hold an online rotation, and no other format can",
        "leave profile out",
    ),
)
"""Rules of ``export``."""
