"""The nearest matrix of a given rank, and how much of the change it keeps.

    dW = U S V^T,    B A = U_r S_r V_r^T,    kept = sum_(i <= r) s_i^2 / sum_i s_i^2

Source: Eckart and Young (1936): no matrix of rank r is nearer in the Frobenius norm.
Shapes: O = out_features, I = in_features, R = rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from qaft.updates.base import LowRankFactors


@dataclass(frozen=True)
class Energy:
    """Squared Frobenius norms: of what is ``kept``, and of the whole."""

    kept: float
    total: float

    @property
    def share(self) -> float:
        """Return kept / total, 1 for no change at all."""
        return self.kept / self.total if self.total else 1.0

    def __add__(self, other: Energy) -> Energy:
        return Energy(self.kept + other.kept, self.total + other.total)


def truncated(change: Tensor, rank: int) -> tuple[LowRankFactors, Energy]:
    """Return the factors of the nearest matrix of this rank to ``change`` [O, I], fp32, and what they keep.

    Both factors get the root of the singular values, so that neither is far smaller than the other in 16 bits.
    """
    left, values, right = torch.linalg.svd(change.float(), full_matrices=False)
    root = values[:rank].sqrt()
    squares = values.double().square()
    factors = LowRankFactors(down=root.unsqueeze(1) * right[:rank], up=left[:, :rank] * root)
    return factors, Energy(float(squares[:rank].sum()), float(squares.sum()))


def energy_table(kept: Mapping[str, Energy]) -> Table:
    """Return the layers and their sum as a rich table."""
    table = Table("layer", "kept", title="squared change that the rank keeps")
    for name, energy in kept.items():
        table.add_row(name, f"{energy.share:.2%}")
    table.add_section()
    table.add_row("all", f"{_sum(kept).share:.2%}")
    return table


def energy_note(kept: Mapping[str, Energy]) -> str:
    """Return what the user has to know of the cut, in a line."""
    least = min(kept, key=lambda name: kept[name].share)
    return (
        f"a dense update cut to this rank: {_sum(kept).share:.2%} of its squared size over all layers is kept, least "
        f"in {least} ({kept[least].share:.2%})"
    )


def _sum(kept: Mapping[str, Energy]) -> Energy:
    return sum(kept.values(), start=Energy(0.0, 0.0))
