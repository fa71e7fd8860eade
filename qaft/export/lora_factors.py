"""An update as the factors of a LoRA on the original base model.

A run in a fused basis (W' = R_out^T W diag(gamma) R_in) is turned back on the factors, with the rank unchanged:

    dW = R_out dW' R_in^T diag(1 / gamma)    =>    B = R_out up,   A = down R_in^T diag(1 / gamma)

In such a run an update sees its inputs without the bias beta of a LayerNorm, which the linear's own bias has taken up;
on the original base it would see beta too, so B gets the bias -dW beta.

A dense update is cut to a rank by the singular values of dW in the original basis.

Shapes: O = out_features, I = in_features, R = rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qaft.errors import ExportError
from qaft.export.truncation import Energy, truncated
from qaft.layers.adapted import AdaptedLinear
from qaft.rotation.place import Place
from qaft.updates.base import LowRankFactors
from qaft.updates.dense import DenseDelta

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel


@dataclass(frozen=True)
class Adapter:
    """One layer's factors in the original basis, the bias [O] of lora_B or None, and what a cut has kept."""

    factors: LowRankFactors
    bias: Tensor | None = None
    kept: Energy | None = None


@torch.no_grad()
def adapter_of(name: str, layer: AdaptedLinear, loaded: LoadedModel, rank: int | None) -> Adapter:
    """Return the LoRA of a layer; ``rank`` is that of an update which has none of its own.

    Raises:
        ExportError, ModelError: a norm weight holds zeros, so that the update cannot be brought back.
    """
    fusion, kept = loaded.fusion, None
    factors = layer.update.low_rank_factors()
    if factors is None:
        assert rank is not None
        change = _dense_change(name, layer, loaded)
        factors, kept = truncated(change, rank)
    elif fusion is not None and name in fusion.places:
        factors = restored(factors, fusion.places[name], loaded)
    if fusion is None or not fusion.moves_shift(name):
        return Adapter(factors, kept=kept)
    beta = loaded.originals[f"{fusion.places[name].norm}.bias"].to(factors.down.device).double()
    return Adapter(factors, -(factors.up.double() @ (factors.down.double() @ beta)).float(), kept)


def _dense_change(name: str, layer: AdaptedLinear, loaded: LoadedModel) -> Tensor:
    """Return dW of a dense update in the original basis, fp32 [O, I]."""
    update = layer.update
    assert isinstance(update, DenseDelta)
    change = update.merge(torch.zeros_like(update.delta)).float()
    return change if loaded.fusion is None else loaded.fusion.inverse(f"{name}.weight", change, loaded.originals)


@torch.no_grad()
def restored(factors: LowRankFactors, place: Place, loaded: LoadedModel) -> LowRankFactors:
    """Return the factors of the same update in the original basis, fp32, computed in fp64.

    Raises:
        ExportError: a norm weight holds zeros, so that the update cannot be undone there.
    """
    down, up = factors.down.double(), factors.up.double()
    if place.reads is not None:
        down = place.reads.undo(down)
    assert loaded.fusion is not None
    gamma = loaded.fusion.gamma(place, loaded.originals)
    if gamma is not None:
        if not bool(gamma.all()):
            raise ExportError(f"{place.norm} holds zeros: its readers cannot be brought back to the original basis")
        down = down / gamma.to(down.device)
    if place.writes is not None:
        up = place.writes.undo(up, dim=0)
    return LowRankFactors(down=down.float(), up=up.float())
