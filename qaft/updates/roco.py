"""RoCoFT: a few rows and columns of the weight.

    W = W0 + c (E_R dR + dC E_C^T),    rows R of [O], columns C of [I]    (RoCoFT, arXiv 2410.10075)

    y = W0 x + c (E_R (dR x) + dC x_C)                                    c = spec.input_scale

Where both are trained, rows own the intersection: dC[R, :] counts as 0, else R x C would take a double step.

Shapes: O = out_features, I = in_features, r = rows, c = columns.  dR [r, I], dC [O, c].
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaft.bases.base import LinearSpec, Matmul
from qaft.updates.base import LowRankFactors, Update
from qaft.updates.choose import SCORED, choose_indices


class RoCo(Update):
    """Rows and columns; r * I + O * c trainables, and only ``x`` (rows) or ``x_C`` (columns) is kept for backward.

    Args:
        spec: the layer to adapt.
        rows: r, trained output rows.
        columns: c, trained input columns.
        choose: first | random | per_head | max | min | mixed; scores come from a calibration pass.

    Raises:
        ValueError: nothing to train, a count out of range, or an unknown ``choose``.
    """

    formula = "W0 + c (E_R dR + dC E_C^T)"
    source = "RoCoFT, arXiv 2410.10075"
    typical: ClassVar[Mapping[str, object]] = MappingProxyType({"rows": 4})

    rows: Tensor
    columns: Tensor

    @classmethod
    def wants_scores(cls, **options: object) -> bool:
        """Return True for the choices that rank by activation statistics."""
        return options.get("choose") in SCORED

    def __init__(self, spec: LinearSpec, *, rows: int = 0, columns: int = 0, choose: str = "per_head") -> None:
        super().__init__()
        if rows == 0 and columns == 0:
            raise ValueError(f"{spec.name}: rows=0 and columns=0 leave nothing to train; try rows: 4")
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.scale = spec.input_scale
        generator = spec.generator()
        row_indices = choose_indices(
            rows,
            spec.out_features,
            choose=choose,
            name=f"{spec.name} rows",
            generator=generator,
            scores=spec.row_scores,
            num_heads=spec.num_heads,
        )
        column_indices = choose_indices(
            columns,
            spec.in_features,
            choose=choose,
            name=f"{spec.name} columns",
            generator=generator,
            scores=spec.column_scores,
        )
        self.register_buffer("rows", row_indices)
        self.register_buffer("columns", column_indices)
        self.row_delta = nn.Parameter(torch.zeros(rows, spec.in_features, dtype=spec.dtype)) if rows else None
        self.column_delta = nn.Parameter(torch.zeros(spec.out_features, columns, dtype=spec.dtype)) if columns else None

    def _rows(self) -> Tensor | None:
        return None if self.row_delta is None else self.scale * self.row_delta

    def _columns(self) -> Tensor | None:
        return None if self.column_delta is None else self._scaled_columns(self.column_delta)

    def _scaled_columns(self, delta: Tensor) -> Tensor:
        return self.scale * (delta if self.row_delta is None else delta.index_fill(0, self.rows, 0))

    def forward(self, x: Tensor, base: Matmul) -> Tensor:
        """Return the updated output, [..., I] -> [..., O]."""
        return self._added(base(x), x, self._rows(), self._columns())

    def tangent(self, x: Tensor, base: Matmul, directions: Mapping[str, Tensor]) -> Tensor:
        """Return ``c (E_R Z_R x + Z_C x_C)``, [..., I] -> [..., O]."""
        rows, columns = directions.get("row_delta"), directions.get("column_delta")
        return self._added(
            x.new_zeros(*x.shape[:-1], self.out_features),
            x,
            None if rows is None else self.scale * rows,
            None if columns is None else self._scaled_columns(columns),
        )

    def _added(self, y: Tensor, x: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        if rows is not None:
            y = y.index_add(-1, self.rows, F.linear(x, rows.to(x.dtype)))
        if columns is not None:
            y = y + F.linear(x.index_select(-1, self.columns), columns.to(x.dtype))
        return y

    def merge(self, weight: Tensor) -> Tensor:
        """Return the weight with the deltas added on the chosen rows and columns, [O, I]."""
        merged, rows = weight, self._rows()
        if rows is not None:
            merged = merged.index_add(0, self.rows, rows.to(weight.dtype))
        columns = self._columns()
        if columns is not None:
            merged = merged.index_add(1, self.columns, columns.to(weight.dtype))
        return merged

    def touched_rows(self) -> Tensor | None:
        """Return the trained rows; None with trained columns, which lie in every row."""
        return self.rows if self.column_delta is None else None

    def low_rank_factors(self) -> LowRankFactors:
        """Return exact factors of rank r + c: one-hot columns for the rows, one-hot rows for the columns."""
        downs, ups = [], []
        rows, columns = self._rows(), self._columns()
        if rows is not None:
            one_hot = torch.zeros(self.out_features, self.rows.numel(), dtype=rows.dtype, device=rows.device)
            one_hot[self.rows, torch.arange(self.rows.numel())] = 1
            downs.append(rows.detach())
            ups.append(one_hot)
        if columns is not None:
            one_hot = torch.zeros(self.columns.numel(), self.in_features, dtype=columns.dtype, device=columns.device)
            one_hot[torch.arange(self.columns.numel()), self.columns] = 1
            downs.append(one_hot)
            ups.append(columns.detach())
        return LowRankFactors(down=torch.cat(downs, 0), up=torch.cat(ups, 1))
