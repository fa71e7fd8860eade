"""The range of an integer grid: which scale s, and which lowest level, a group of weights gets.

    absmax          symmetric    s = c max |w| / q_max
                    asymmetric   s = c (max(w, 0) - min(w, 0)) / (2^b - 1),  lowest level round(c min(w, 0) / s)
    signed_absmax   s = -m / 2^(b-1), m the weight of largest magnitude: it is the lowest level; s may be negative
    mse             as absmax, with the c of a search that has the least squared error in the group
    rms             s = min(k rms(w), max |w|) / q_max, k the best for a normal distribution: no search

    q_max = 2^(b-1) - 1;  symmetric levels: [-q_max, q_max] for absmax with c = 1, otherwise [-q_max - 1, q_max]

c < 1, mse and rms clip: fewer steps are spent on rare extremes. They would clip a quantized weight a second time.
A group that lies on the unclipped grid already therefore keeps its scale, which makes every grid a projection,
Q(Q(w)) = Q(w). (mse finds that scale by itself: its search begins there, and the error is 0.) mse and rms sum over a
group, so that another device, which sums in another order, may choose the neighbouring scale.

Relative squared error of normal weights, 4 bits, groups of 128 and 4096, in thousandths: absmax 13.8 and 24.8;
signed_absmax 10.6 and 19.0; mse 10.2 and 11.8; rms 11.7 and 11.9; asymmetric absmax 10.1 and 19.5, with c = 0.95 9.4
and 17.7, with c = 0.7 22 and 12.0.

Source: RoSTE (arXiv 2502.09003), equation 6, with both ends of an asymmetric range clipped; llama.cpp for
signed_absmax; QuEST (arXiv 2502.05003) for rms.
Shapes: O = out_features, G = groups, N = weights per group; groups [O, G, N], scales and lowest levels [O, G]; fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qaft.quant.masks import inside
from qaft.quant.scales import ScaleStorage, quotient

RANGES = ("absmax", "mse", "rms", "signed_absmax")

_GAUSSIAN_LOADING = {2: 1.05, 3: 1.81, 4: 2.37, 5: 2.83, 6: 3.23, 7: 3.58, 8: 3.91}
"""k: s q_max / rms of least squared error for a normal distribution and the 2^b levels from -q_max - 1 to q_max."""

_COARSE_CLIPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
_FINE_CLIPS = (-0.06, -0.03, 0.03, 0.06)
"""The search of ``mse``: the coarse clips besides none, then these distances from the best. For normal weights the
error is within 2 % of that of a search in steps of 0.01, at a sixth of its passes."""

Fit = tuple[Tensor, Tensor]
"""Scales and lowest levels, both fp32 [O, G]."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """How groups get their scales.

    Attributes:
        kind: one of ``RANGES``.
        clip: c, the part of the range that is kept, in (0, 1]; absmax only.
        bits: b.
        symmetric: no zero point.
        storage: how scales are stored.

    Raises:
        ValueError: an option is out of range, or does not exist for this kind.
    """

    kind: str
    clip: float
    bits: int
    symmetric: bool
    storage: ScaleStorage

    def __post_init__(self) -> None:
        if self.kind not in RANGES:
            raise ValueError(f"range={self.kind!r} must be one of {', '.join(RANGES)}")
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip={self.clip} must be in (0, 1]")
        if self.clip < 1 and self.kind != "absmax":
            raise ValueError(f"clip={self.clip} applies to range absmax: {self.kind} has its own, leave clip out")
        if not self.symmetric and self.kind in ("rms", "signed_absmax"):
            raise ValueError(f"range={self.kind!r} is for symmetric grids: use absmax or mse, or set symmetric: true")

    @property
    def q_max(self) -> int:
        """The highest code, 2^(b-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def q_min(self) -> int:
        """The lowest code."""
        return -self.q_max if self.symmetric and self.follows_extremes else -self.q_max - 1

    @property
    def span(self) -> int:
        """The number of steps between the lowest and the highest code."""
        return self.q_max - self.q_min

    @property
    def follows_extremes(self) -> bool:
        """Whether the whole range of the weights is inside that of the grid, up to the rounding of the scale."""
        return self.kind == "absmax" and self.clip == 1

    @property
    def refits(self) -> bool:
        """Whether scales depend on more than the extremes; latents with given scales cannot be constructed then."""
        return self.kind in ("mse", "rms") or self.clip < 1

    def fit(self, groups: Tensor) -> Fit:
        """Return the scales of ``groups`` and their lowest levels in units of the scale."""
        if self.kind == "signed_absmax":
            return self._signed(groups)
        if self.kind == "mse":
            return self._least_error(groups)
        if self.follows_extremes:
            return self._extremes(groups, 1.0)
        if self.kind == "rms":
            return self._keeping_grid_points(groups, self._rms(groups))
        return self._keeping_grid_points(groups, self._extremes(groups, self.clip))

    def levels(self, groups: Tensor, *, ste: str, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return ``round(w / s)`` within the range [O, G, N], the scales, and the lowest levels.

        Last, with ``masked``: where the mask ``ste`` lets the gradient pass, bool [O, G, N].
        """
        scale, lowest = self.fit(groups)
        low, high = lowest.unsqueeze(-1), lowest.unsqueeze(-1) + self.span
        levels = groups / scale.unsqueeze(-1)
        passes = None
        if masked:
            # The lowest level of a signed range is its extreme, which only the rounding of the scale puts outside.
            bound = -torch.inf if self.kind == "signed_absmax" else low
            passes = inside(levels, bound, high, ste=ste, half_step=0.5)
        return torch.clamp(levels.round_(), low, high), scale, lowest, passes

    def _extremes(self, groups: Tensor, clip: float | Tensor) -> Fit:
        if not self.symmetric:
            return self._asymmetric(groups, clip)
        return self._from_scale(self.storage.round(quotient(groups.abs().amax(-1) * clip, self.q_max)))

    def _asymmetric(self, groups: Tensor, clip: float | Tensor) -> Fit:
        """Return a fit whose codes reach both ends of the range, without which requantizing would shrink the scale.

        A scale that was rounded up, or two ties, can leave the last code unused; the next smaller scale does not.
        """
        low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
        scale = self.storage.round(quotient((high - low) * clip, self.span))
        unused = (high / scale).round_() - (low / scale).round_() < self.span
        unused &= (scale > self.storage.smallest) & scale.isfinite()
        scale = torch.where(unused, self.storage.next_smaller(scale), scale)
        # Both ends at once are reachable from these levels on and up to these.
        reaches_low, reaches_high = (low / scale).round_(), (high / scale).round_() - self.span
        lowest = (clip * low / scale).round_()
        lowest = torch.maximum(torch.minimum(lowest, reaches_high), reaches_low)
        return scale, lowest.clamp_(min=-self.span)

    def _signed(self, groups: Tensor) -> Fit:
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale, lowest = self._from_scale(self.storage.round(quotient(extreme.abs(), -self.q_min)))
        # At the smallest scale the levels are all zeros: a sign would follow what is rounded away.
        return torch.where((extreme > 0) & (scale > self.storage.smallest), -scale, scale), lowest

    def _rms(self, groups: Tensor) -> Fit:
        loading = _GAUSSIAN_LOADING[self.bits]
        reach = torch.minimum(groups.square().mean(-1).sqrt() * loading, groups.abs().amax(-1))
        return self._from_scale(self.storage.round(quotient(reach, self.q_max)))

    def _from_scale(self, scale: Tensor) -> Fit:
        return scale, torch.full_like(scale, self.q_min)

    def _unclipped(self, groups: Tensor) -> list[Fit]:
        """Return the fits under which a grid point is exact."""
        if not self.symmetric:
            return [self._extremes(groups, 1.0)]
        # The largest magnitude of a grid point is level q_max or level q_min.
        absmax = groups.abs().amax(-1)
        return [self._from_scale(self.storage.round(quotient(absmax, top))) for top in (self.q_max, -self.q_min)]

    def _keeping_grid_points(self, groups: Tensor, fit: Fit) -> Fit:
        for other in reversed(self._unclipped(groups)):
            exact = (self._quantized(groups, other) == groups).all(-1)
            fit = _choose(exact, other, fit)
        return fit

    def _least_error(self, groups: Tensor) -> Fit:
        first, *others = self._unclipped(groups)
        best = _Best(first, self._error(groups, first), torch.ones_like(first[0]))
        for fit in others:
            best.offer(fit, self._error(groups, fit), best.clip)
        coarse = [torch.full_like(best.clip, clip) for clip in _COARSE_CLIPS]
        self._try(groups, coarse, best)
        self._try(groups, [(best.clip + distance).clamp_(max=1.0) for distance in _FINE_CLIPS], best)
        return best.fit

    def _try(self, groups: Tensor, clips: Sequence[Tensor], best: _Best) -> None:
        for clip in clips:
            fit = self._extremes(groups, clip)
            best.offer(fit, self._error(groups, fit), clip)

    def _error(self, groups: Tensor, fit: Fit) -> Tensor:
        return self._quantized(groups, fit).sub_(groups).square_().sum(-1)

    def _quantized(self, groups: Tensor, fit: Fit) -> Tensor:
        scale, lowest = (part.unsqueeze(-1) for part in fit)
        return torch.clamp((groups / scale).round_(), lowest, lowest + self.span).mul_(scale)


@dataclass
class _Best:
    """The fit of least error so far, its error and its clip, [O, G] each."""

    fit: Fit
    error: Tensor
    clip: Tensor

    def offer(self, fit: Fit, error: Tensor, clip: Tensor) -> None:
        """Take ``fit`` for the groups where its error is less."""
        less = error < self.error
        self.fit = _choose(less, fit, self.fit)
        self.error = torch.where(less, error, self.error)
        self.clip = torch.where(less, clip, self.clip)


def _choose(condition: Tensor, yes: Fit, no: Fit) -> Fit:
    return torch.where(condition, yes[0], no[0]), torch.where(condition, yes[1], no[1])
