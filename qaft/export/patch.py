"""``patch``: the touched rows of the packed model, to be put onto a packed base that many fine-tunes share.

    packed(Q(merge(W0)))[R] != packed(Q(W0))[R]  only for the rows R that the update touches

Scales belong to one row, so rows quantize independently: training rows through the grid is training the model that is
base and patch. Both states of the rows are written, so that a patch can be taken off again. The base is a checkpoint
with the packed codes of the untrained model (``qaft patch base``): compressed-tensors for int grids, bitsandbytes for
nf4 and fp4.

Source: RoCoFT (arXiv 2410.10075) for the updates; the locality of bitsandbytes blocks is QLoRA's (arXiv 2305.14314).
Shapes: O = out_features, I = in_features, R = touched rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qaft.bases.affine import AffineBase
from qaft.bases.dense import DenseBase
from qaft.errors import ExportError
from qaft.export.base import EXACT, FLIPPING, ExportInfo, ExportReport, Linear, Written
from qaft.export.checkpoint_writer import to_dtype
from qaft.export.packed import Packing, plan_packing
from qaft.export.packed_model import HELD
from qaft.export.packed_rows import rows_of, stored_base, stored_codes
from qaft.export.patch_file import LayerPatch, digest, save_patch
from qaft.export.publish import publish
from qaft.export.quantization_config import PACKABLE_BITS
from qaft.export.tensors import linear_layers, model_dtype, model_parts, require_plain_options, require_portable
from qaft.layers.adapted import AdaptedLinear
from qaft.quant.affine import Affine
from qaft.quant.base import QTensor, Quantizer
from qaft.quant.codebook import CodeBook

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel
    from qaft.sections import ExportSection

_OTHERS = "export `compressed-tensors` or `merged`"


def export_patch(loaded: LoadedModel, section: ExportSection, folder: Path, info: ExportInfo) -> ExportReport:
    """The rows that were trained through a grid, as a small file that `qaft patch` puts onto a shared packed base.

    Raises:
        ExportError: see ``Exporter``; or an update touches every row, or was not trained through a grid whose rows are
            independent.
    """
    require_plain_options(section)
    layers = linear_layers(loaded.model)
    require_portable(layers)
    adapted = {name: layer for name, layer in layers.items() if isinstance(layer, AdaptedLinear)}
    if not adapted:
        raise ExportError("patch: the run adapts no layer, so there is nothing to write")
    grids = {name: _grid(name, layer) for name, layer in adapted.items()}
    _require_one_format(layers, next(iter(grids.values())))
    on_book = any(isinstance(grid, CodeBook) for grid in grids.values())
    plan = None if on_book else plan_packing(loaded, layers, force=False)
    return publish(loaded, section, folder, info, write=partial(_write, loaded, grids, plan))


def _grid(name: str, layer: AdaptedLinear) -> Quantizer:
    grid = layer.quantizer
    if grid is None:
        raise ExportError(
            f"{name}: was not trained through a grid, and rows that are quantized afterwards lose most of their update;"
            " train with a qat section, or export `peft` or `merged`"
        )
    if layer.update.touched_rows() is None:
        raise ExportError(
            f"{name}: update {type(layer.update).__name__} changes every row, and a patch holds a few; {_OTHERS}, or "
            "train with update.kind roco and rows, or sift"
        )
    if not isinstance(grid, (Affine, CodeBook)):
        raise ExportError(f"{name}: no packed checkpoint holds the grid {type(grid).__name__}; export `merged`")
    if isinstance(grid, Affine) and grid.bits not in PACKABLE_BITS:
        packable = " and ".join(map(str, PACKABLE_BITS))
        raise ExportError(f"{name}: {grid.bits}-bit weights, but packed bases have {packable} bits; export `merged`")
    return grid


def _require_one_format(layers: Mapping[str, Linear], grid: Quantizer) -> None:
    """Refuse frozen layers that no checkpoint holds beside the trained ones.

    Raises:
        ExportError: int codes beside those of bitsandbytes.
    """
    for name, layer in layers.items():
        if isinstance(layer, (AdaptedLinear, DenseBase)) or isinstance(layer, AffineBase) == isinstance(grid, Affine):
            continue
        storage = "int4 or int8_group" if isinstance(grid, Affine) else "nf4, fp4"
        raise ExportError(
            f"{name}: is stored as {type(layer).__name__}, and no checkpoint holds that beside trained layers on "
            f"{type(grid).__name__}: set model.storage to {storage} or bf16"
        )


def _write(loaded: LoadedModel, grids: Mapping[str, Quantizer], plan: Packing | None, folder: Path) -> Written:
    """Write the patch; ``plan`` is how a compressed-tensors export packs the layers, None for bitsandbytes."""
    dtype = model_dtype(loaded)
    patches: dict[str, LayerPatch] = {}
    base: dict[str, str] = {}
    for name, part in model_parts(loaded.model):
        if isinstance(part, Tensor):
            base[name] = digest(to_dtype(name, part, dtype))
            continue
        if isinstance(part, AdaptedLinear):
            stored, patch = _touched(name, part, grids[name], packed=plan is None or plan.grids[name].packed)
            patches |= {} if patch is None else {name: patch}
        elif plan is not None and name in plan.codes:
            stored = stored_codes(plan.codes[name](), plan.grids[name].bits, packed=plan.grids[name].packed)
        else:
            stored = stored_base(part)
        if part.bias is not None:
            stored = {**stored, "bias": to_dtype(name, part.bias, dtype)}
        base |= {f"{name}.{leaf}": digest(tensor) for leaf, tensor in stored.items()}
    save_patch(patches, base, folder)
    rows, trained = sum(len(p.rows) for p in patches.values()), len(grids)
    inputs = None if plan is None else plan.inputs
    return Written(
        dtype=dtype,
        # Of the base with the patch on it.
        bound=HELD if plan is None else EXACT if inputs is None else FLIPPING,
        exported_weight=None if plan is None or plan.is_live(dtype) else partial(plan.weight, dtype),
        basis="original" if loaded.fusion is None else "fused",
        grids=_described(grids, plan),
        inputs=inputs,
        unloadable="no program loads rows without their base; put them onto it with `qaft patch apply`, and check that "
        "folder with `qaft export --check-only`",
        notes=(
            f"{rows} rows of {trained} layers; compared while writing: every other code and scale is that of the base",
            "put it onto the base with `qaft patch apply`, take it off with `qaft patch revert`",
        ),
    )


def _described(grids: Mapping[str, Quantizer], plan: Packing | None) -> tuple[Mapping[str, Any], ...]:
    """Return the grids of the base as plain values."""
    if plan is not None:
        return tuple(grid.describe() for grid in dict.fromkeys(plan.grids.values()))
    books = dict.fromkeys((grid.kind, grid.group_size) for grid in grids.values() if isinstance(grid, CodeBook))
    return tuple({"kind": kind, "bits": 4, "group_size": size, "symmetric": True} for kind, size in books)


@torch.no_grad()
def _touched(
    name: str, layer: AdaptedLinear, grid: Quantizer, *, packed: bool
) -> tuple[dict[str, Tensor], LayerPatch | None]:
    """Return the layer as the base stores it, and its touched rows (None when there are none)."""
    rows = layer.update.touched_rows()
    assert rows is not None
    before = grid.quantize(layer.base.dequantize().float())
    after = layer.quantized()
    assert after is not None
    to_dtype(f"{name}.weight_scale", after.scale, after.scale.dtype)
    old, new = (rows_of(codes, grid.bits, packed=packed) for codes in (before, after))
    rows = rows.to(after.values.device).long()
    if not _equal_elsewhere(before, after, rows):
        raise ExportError(f"{name}: rows that were not trained have other codes than the base: report it; {_OTHERS}")
    stored = stored_codes(before, grid.bits, packed=packed)
    if not len(rows):
        return stored, None
    return stored, LayerPatch(
        rows=rows.int(),
        old={part: tensor[rows] for part, tensor in old.items()},
        new={part: tensor[rows] for part, tensor in new.items()},
        out_features=layer.out_features,
        bits=grid.bits,
    )


def _equal_elsewhere(a: QTensor, b: QTensor, rows: Tensor) -> bool:
    others = torch.ones(len(a.values), dtype=torch.bool, device=a.values.device).index_fill_(0, rows, False)
    pairs = ((a.values, b.values), (a.scale, b.scale), (a.zero_point, b.zero_point))
    return all(x is y or (x is not None and y is not None and torch.equal(x[others], y[others])) for x, y in pairs)
