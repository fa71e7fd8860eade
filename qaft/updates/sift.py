"""SIFT: a few entries of the weight, those with the largest gradient.

    W = W0 + c scatter(places, v)                     (SIFT, arXiv 2312.11875, section 3; c = spec.input_scale)

The values are ordinary parameters, so that any optimizer steps them as it would step the masked dense weight, and
nothing of the size of the weight outlives a product. Up to ``SPARSE_RATE`` the change is multiplied as a sparse matrix,
of entries or of blocks; above, it is scattered in the forward pass, and again in the backward pass, where v's gradient
is gathered from g^T x.

Shapes: O = out_features, I = in_features, n places of w consecutive entries.  v [n, w].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaft.bases.base import LinearSpec, Matmul
from qaft.bases.rebuilt import rebuilt_linear
from qaft.updates.base import Update
from qaft.updates.block_product import BlockGroups, block_linear
from qaft.updates.entries import WIDTHS, EntryChoice
from qaft.updates.sparse_product import EntryOrder, sparse_linear

CHOICES = ("gradient", "magnitude", "random")

SPARSE_RATE = 1 / 32
"""Share of the entries up to which a sparse product is the faster one: an entry costs it some 30 times as much."""


class Sift(Update):
    """``y = W0 x + c D x`` with a sparse D; about rate * O * I trainables, and only ``x`` is kept for backward.

    Args:
        spec: the layer to adapt.
        rate: fraction of the entries that is trained.
        entries: ``entry``, or ``block64`` for whole blocks of a quantized base.
        choose: by ``gradient`` (back-propagation over a few batches), ``magnitude`` of the base weight, or ``random``.

    Raises:
        ValueError: rate is not in (0, 1], an option is unknown, blocks do not divide I, or the choice is missing.
    """

    formula = "W0 + c scatter(places, v)"
    source = "SIFT, arXiv 2312.11875"

    places: Tensor

    @classmethod
    def entry_choice(cls, **options: object) -> EntryChoice:
        """Return how many entries are wanted, in what blocks, and by which score."""
        rate, entries = options.get("rate", 0.01), options.get("entries", "entry")
        by = options.get("choose", "gradient")
        if not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(f"rate={rate} must be above 0 and at most 1; try rate: 0.01")
        if entries not in WIDTHS:
            raise ValueError(f"entries={entries!r} must be one of {', '.join(WIDTHS)}")
        if by not in CHOICES:
            raise ValueError(f"choose={by!r} must be one of {', '.join(CHOICES)}")
        return EntryChoice(rate=float(rate), width=WIDTHS[str(entries)], by=str(by))

    def __init__(
        self, spec: LinearSpec, *, rate: float = 0.01, entries: str = "entry", choose: str = "gradient"
    ) -> None:
        super().__init__()
        try:
            choice = self.entry_choice(rate=rate, entries=entries, choose=choose)
        except ValueError as error:
            raise ValueError(f"{spec.name}: {error}") from error
        if spec.in_features % choice.width:
            raise ValueError(
                f"{spec.name}: entries={entries!r} needs input features divisible by {choice.width}, not "
                f"{spec.in_features}; use entries: entry"
            )
        self.scale = spec.input_scale
        self.out_features, self.in_features = spec.out_features, spec.in_features
        self.register_buffer("places", _places(spec, choice))
        trained = self.places.numel() * choice.width
        self._is_sparse = trained <= SPARSE_RATE * self.out_features * self.in_features
        self._sorted: tuple[tuple[int, int], EntryOrder | BlockGroups] | None = None
        self.values = nn.Parameter(torch.zeros(self.places.numel(), choice.width, dtype=spec.dtype))

    def _change(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``c D`` with the given values, [O, I]."""
        width = values.shape[1]
        change = torch.zeros(self.out_features * self.in_features // width, width, dtype=dtype, device=values.device)
        change = change.index_add(0, self.places, (self.scale * values).to(dtype))
        return change.view(self.out_features, self.in_features)

    def forward(self, x: Tensor, base: Matmul) -> Tensor:
        """Return the updated output, [..., I] -> [..., O]."""
        if not self._is_sparse:
            return base(x) + rebuilt_linear(x, lambda: self._change(self.values, x.dtype), None, self.values)
        places = self._sorted_places()
        if isinstance(places, BlockGroups):
            change = block_linear(x, self.values, places, scale=self.scale, out_features=self.out_features)
        else:
            change = sparse_linear(x, self.values, self.places, places, scale=self.scale)
        return base(x) + change

    def _sorted_places(self) -> EntryOrder | BlockGroups:
        """Return the order of the entries by column or the blocks in groups, made anew when other places are loaded."""
        state = (self.places.data_ptr(), self.places._version)
        if self._sorted is None or self._sorted[0] != state:
            width = self.values.shape[1]
            if width == 1:
                made = EntryOrder.of(self.places, (self.out_features, self.in_features))
            else:
                made = BlockGroups.of(self.places, self.in_features // width)
            self._sorted = (state, made)
        return self._sorted[1]

    def tangent(self, x: Tensor, base: Matmul, directions: Mapping[str, Tensor]) -> Tensor:
        """Return ``c scatter(z) x``, [..., I] -> [..., O]."""
        return F.linear(x, self._change(directions["values"], x.dtype))

    def merge(self, weight: Tensor) -> Tensor:
        """Return the weight with the values added at their places, [O, I]."""
        flat = weight.reshape(-1, self.values.shape[1])
        return flat.index_add(0, self.places, (self.scale * self.values).to(weight.dtype)).view(weight.shape)

    def touched_rows(self) -> Tensor:
        """Return the rows that hold a place."""
        return (self.places.long() * self.values.shape[1] // self.in_features).unique()


def _places(spec: LinearSpec, choice: EntryChoice) -> Tensor:
    numel = spec.out_features * spec.in_features
    if choice.by == "random":
        return choice.random(numel, spec.generator())
    if spec.places is None:
        raise ValueError(f"{spec.name}: choose={choice.by!r} needs the entries of a selection pass; use random without")
    if spec.places.numel() != choice.count(numel):
        raise ValueError(f"{spec.name}: {spec.places.numel()} places were selected, must be {choice.count(numel)}")
    return spec.places.int()
