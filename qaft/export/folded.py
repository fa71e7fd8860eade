"""The model with its channel scalings folded in, for as long as it is exported: then it is the trained one again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qaft.arch import arch_of
from qaft.bases.base import FrozenLinear
from qaft.bases.row_scaled import row_scaled
from qaft.errors import ExportError
from qaft.evaluate.difference import PromptLogits, compare_logits, prompt_ids
from qaft.evaluate.float32 import float_logits
from qaft.export.base import Linear
from qaft.export.fold import Fold, base_of, is_scaling, plan_fold
from qaft.export.tensors import linear_layers
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.attach import replace_module

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel
    from qaft.sections import ExportSection

PACKED_FORMATS = ("bnb", "compressed-tensors", "gptq")
"""Formats that hold codes, into which an update without a grid can only be folded."""


@contextmanager
@torch.no_grad()
def folded(loaded: LoadedModel, fold: Fold) -> Iterator[None]:
    """Let the model be the folded one, without any update, during the block; afterwards it is as it was."""
    layers = linear_layers(loaded.model)
    undo: list[Callable[[], None]] = []
    try:
        for name, layer in layers.items():
            if isinstance(layer, AdaptedLinear) or name in fold.passed:
                undo.append(lambda name=name, layer=layer: replace_module(loaded.model, name, layer))
                replace_module(loaded.model, name, _folded_layer(name, layer, fold))
        plus_one = bool(fold.norms) and arch_of(loaded.source.config).family.norm == "rms_plus_one"
        for name, change in fold.norms.items():
            for leaf, parameter in loaded.model.get_submodule(name).named_parameters():
                undo.append(lambda parameter=parameter, before=parameter.data: setattr(parameter, "data", before))
                parameter.data = _folded_norm(parameter.data, change, plus_one=plus_one and leaf == "weight")
        yield
    finally:
        for step in undo:
            step()


def _folded_layer(name: str, layer: Linear, fold: Fold) -> FrozenLinear:
    base = base_of(layer)
    factor = torch.ones(layer.out_features, device=next(base.buffers()).device)
    for changes in (fold.outputs, fold.passed):
        if name in changes:
            factor = factor * (1 + changes[name].detach().float())
    scaled = row_scaled(base, factor, name=name)
    if name in fold.passed and base.bias is not None:
        scaled.bias = (base.bias.float() * (1 + fold.passed[name].float())).to(base.bias.dtype)
    return scaled


def _folded_norm(parameter: Tensor, change: Tensor, *, plus_one: bool) -> Tensor:
    factor, value = 1 + change.detach().float(), parameter.float()
    return ((1 + value) * factor - 1 if plus_one else value * factor).to(parameter.dtype)


def require_foldable(loaded: LoadedModel, section: ExportSection) -> None:
    """Refuse, before anything is trained, scalings that this export could not fold.

    Raises:
        ExportError: see ``plan_fold``.
    """
    if section.format in PACKED_FORMATS and is_scaling(loaded):
        plan_fold(loaded)


@contextmanager
def serving_form(loaded: LoadedModel, section: ExportSection) -> Iterator[tuple[str, ...]]:
    """Let the model be what the export holds during the block, and yield what the user has to know of that.

    Updates that only scale the channels of a packed model are folded for packed formats and for ``merged`` in the
    fused basis; every other model is exported as it is.

    Raises:
        ExportError: the format holds codes, and a scaling cannot be folded.
    """
    fold, notes = _fold_of(loaded, section)
    if fold is None:
        yield notes
        return
    ids = prompt_ids(loaded.tokenizer) if section.verify else ()
    before = float_logits(loaded.model, ids)
    with folded(loaded, fold):
        after = float_logits(loaded.model, ids)
        yield (_note(fold), *([_measured(ids, before, after)] if section.verify else []))


def _fold_of(loaded: LoadedModel, section: ExportSection) -> tuple[Fold | None, tuple[str, ...]]:
    folds = section.format in PACKED_FORMATS or (section.format == "merged" and section.basis == "fused")
    if not folds or not is_scaling(loaded):
        return None, ()
    try:
        return plan_fold(loaded), ()
    except ExportError as error:
        if section.format in PACKED_FORMATS:
            raise
        return None, (f"merged weight by weight, which leaves the grid of the base: {error}",)


def _note(fold: Fold) -> str:
    return (
        f"channel scalings are folded into the row scales of {len({**fold.outputs, **fold.passed})} layers and into "
        f"{len(fold.norms)} norms: every code is that of the base, each scale and norm weight is rounded once"
    )


def _measured(ids: tuple[Tensor, ...], before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> str:
    rounding = compare_logits(PromptLogits(ids, before), PromptLogits(ids, after))
    moved = f"{rounding.max_relative:.1e} relative, KL {rounding.kl_mean:.1e} nats per token"
    return f"that rounding moves logits by {moved}"
