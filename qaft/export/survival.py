"""What is left of an update that was not trained through the grid, once the merged weight is put onto the grid.

    D = W - W0          the update,          R = Q(W) - Q(W0)      what the export realizes of it

    share = <R, D> / <D, D>                  1: all of it, 0: nothing
    error = |Q(W) - W| / |D|                 output error relative to the update's own effect, for uncorrelated inputs

A base on its own grid swallows updates below half a step: of 1 % of the weight's size a share of 0.00 is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qaft.errors import ExportError
from qaft.export.base import Linear
from qaft.layers.adapted import AdaptedLinear
from qaft.quant.base import Quantizer

SMALLEST_SHARE = 0.7
"""Below this the exported model is closer to the base than to the trained one in what training changed."""

_SHOWN = 3


@dataclass(frozen=True)
class Survival:
    """What one layer keeps. For a layer without an update ``share`` is None and ``error`` relative to the weight."""

    name: str
    share: float | None
    error: float


def survival(name: str, base: Tensor, updated: Tensor, served_base: Tensor, served: Tensor) -> Survival:
    """Return how much of an update survives.

    Args:
        name: the layer.
        base: W0, [O, I].
        updated: W, [O, I].
        served_base: Q(W0), [O, I].
        served: Q(W), [O, I].
    """
    update = updated.double() - base.double()
    size = float(update.norm())
    loss = float((served.double() - updated.double()).norm())
    if size == 0:
        return Survival(name, None, loss / max(float(updated.double().norm()), 1e-300))
    realized = served.double() - served_base.double()
    return Survival(name, float((realized * update).sum()) / size**2, loss / size)


@torch.no_grad()
def latent(layer: Linear) -> Tensor:
    """Return the weight of a layer before it is put onto a grid, fp32 [O, I]."""
    return layer.latent() if isinstance(layer, AdaptedLinear) else layer.dequantize().float()


def layer_survival(name: str, layer: Linear, quantizer: Quantizer) -> Survival:
    """Return how much of a layer's update survives on the grid of ``quantizer``."""
    base = (layer.base if isinstance(layer, AdaptedLinear) else layer).dequantize().float()
    updated = latent(layer)
    return survival(name, base, updated, _served(quantizer, base), _served(quantizer, updated))


def _served(quantizer: Quantizer, weight: Tensor) -> Tensor:
    return quantizer.quantize(weight).dequantize(torch.float32)


def survival_table(rows: Sequence[Survival]) -> Table:
    """Return the layers as a rich table."""
    table = Table("layer", "update kept", "error", title="what survives requantization")
    for row in rows:
        table.add_row(row.name, "no update" if row.share is None else f"{row.share:.1%}", f"{row.error:.3f}")
    return table


def survival_notes(rows: Sequence[Survival]) -> tuple[str, ...]:
    """Return what a user of an export with requantized layers has to know; nothing where none had an update."""
    shares = [row.share for row in rows if row.share is not None]
    if not shares:
        return ()
    return (f"put onto the grid untrained: {min(shares):.1%} to {max(shares):.1%} of each update survives",)


def require_survival(rows: Sequence[Survival], *, force: bool) -> None:
    """Show what survives, where layers are requantized, and refuse to write when one loses its update.

    Raises:
        ExportError: a share is below ``SMALLEST_SHARE`` and ``force`` is not set; the message names the worst layers.
    """
    if rows:
        Console(stderr=True).print(survival_table(rows))
    lost = sorted((row.share, row.name) for row in rows if row.share is not None and not row.share >= SMALLEST_SHARE)
    if not lost or force:
        return
    worst = "; ".join(f"{name} keeps {share:.1%}" for share, name in lost[:_SHOWN])
    raise ExportError(
        f"{len(lost)} of {len(rows)} requantized layers would lose more than {1 - SMALLEST_SHARE:.0%} of their update "
        f"({worst}): it was not trained through the grid. Train with a qat section, or export `merged` or `peft`, "
        "or write it all the same with force: true"
    )
