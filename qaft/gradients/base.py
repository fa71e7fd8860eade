"""Where gradients come from.

    G1:  a source returns a scalar whose gradient is the estimate.
         Backprop: the loss itself. A two-point method: sum_g c_g sum(p * u_g), whose gradient in p is sum_g c_g u_g.

So every engine and optimizer sees one thing: a scalar to back-propagate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

Parameters = Mapping[str, nn.Parameter]
"""The trained parameters by name."""

Direction = Mapping[str, Tensor]
"""A tensor for some or all of the parameters, by name."""


@dataclass(frozen=True)
class PairedLosses:
    """Losses of a micro-batch's examples on both sides of a probe; every field [N], fp64 or int64, on the CPU.

    Attributes:
        plus: sum of the losses of each example's targets at theta + epsilon u.
        minus: the same at theta - epsilon u.
        targets: positions with loss in each example, at least 1.
        direction: index into the directions that were given, of the one that the example probed.
    """

    plus: Tensor
    minus: Tensor
    targets: Tensor
    direction: Tensor


class Closure(Protocol):
    """The objective at one micro-batch as a function of the parameters (noise is reseeded inside)."""

    @property
    def step(self) -> int:
        """Optimizer step, from 0."""
        ...

    @property
    def run_seed(self) -> int:
        """Seed of the run, the same on every rank."""
        ...

    @property
    def is_last(self) -> bool:
        """Whether this is the last micro-batch of the step."""
        ...

    @property
    def rank(self) -> int:
        """Index of this process."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    def __call__(self) -> Tensor:
        """Return the scalar objective; equal parameters give an equal value."""
        ...

    def pair(self, directions: Sequence[Direction], epsilon: float) -> PairedLosses:
        """Return the losses at theta + and - ``epsilon`` times the directions, without a gradient.

        The examples are divided among the directions in equal shares. Nothing is written to any parameter.
        """
        ...

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return every rank's values, in the order of the ranks; the same on all; collective."""
        ...


@dataclass(frozen=True)
class GradientEstimate:
    """What a source makes of one micro-batch.

    Attributes:
        surrogate: back-propagated (law G1).
        loss: detached, for logs.
        scalars: with the last micro-batch of a step, all that the step depends on besides (seed, step); empty for
            sources that need a backward pass.
        metrics: values for the log, with the last micro-batch of a step.
    """

    surrogate: Tensor
    loss: Tensor
    scalars: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


class GradientSource(Protocol):
    """Turns a loss closure into a surrogate; leaves the parameters as it found them."""

    needs_backward: bool
    """Whether the closure must build an autograd graph (activations are kept)."""

    def __call__(self, closure: Closure, params: Parameters) -> GradientEstimate:
        """Evaluate ``closure`` as often as needed and return the estimate."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue with the same estimates (JSON-able or tensors)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``."""
        ...
