"""Two-point estimates: what all zeroth-order sources share; they differ in what they perturb and what they draw.

    c_g = [F(theta + epsilon u_g) - F(theta - epsilon u_g)] / (2 epsilon),    estimate = sum_g c_g u_g

Each of G directions is probed by its own part of the data (of an example group, or of a rank) and c_g is normalised by
the targets of the whole step, so that the sum estimates the gradient of the mean loss. Directions follow from
(run seed, step, parameter name, g): a step is known from its few scalars c_g, which is what a journal holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qaft.gradients.base import Closure, GradientEstimate, Parameters
from qaft.gradients.epsilon import Epsilon, check_epsilon, choose_epsilon
from qaft.gradients.projection import StepSums
from qaft.philox import key_of, signs

PROBE = "probe"
"""Purpose of the random numbers that the loss is probed with."""

_MEMORY = 100
_WARMUP = 10


class TwoPointSource:
    """A gradient from losses alone.

    Args:
        epsilon: step of the probe, rounded to bf16 (so that it is exact in every dtype); ``auto`` measures one.
        directions: G, directions that each rank probes, each with its share of the rows.
        shared: all ranks probe the same directions (their data is averaged for each); otherwise each rank has its own,
            which has less variance for the same cost.
        outlier: a scalar this many times larger than their running mean is replaced by 0; None for never.

    Raises:
        ValueError: an option is out of range.
    """

    needs_backward = False

    def __init__(self, *, epsilon: float | str, directions: int, shared: bool, outlier: float | None) -> None:
        if epsilon != "auto" and not (isinstance(epsilon, float | int) and 0 < epsilon < 1):
            raise ValueError(f"epsilon={epsilon!r} must be auto or a number in (0, 1); 1e-3 is usual")
        if directions < 1:
            raise ValueError(f"directions={directions} must be at least 1")
        if outlier is not None and outlier <= 1:
            raise ValueError(f"outlier={outlier} must be null or above 1: it is a factor on the mean size of c")
        self._given = None if epsilon == "auto" else float(torch.tensor(epsilon, dtype=torch.bfloat16))
        self._directions = directions
        self._shared = shared
        self._outlier = outlier
        self._epsilon: Epsilon | None = None
        self._mean_size, self._sizes = 0.0, 0
        self._sums: StepSums | None = None

    def active(self, params: Parameters, step: int) -> dict[str, nn.Parameter]:
        """Return the parameters that are perturbed and trained at a step: all, unless a source says otherwise."""
        return dict(params)

    def draw(self, active: Parameters, *, seed: int, step: int, number: int, purpose: str) -> dict[str, Tensor]:
        """Return the direction of this number for all parameters of ``active``: new fp32 tensors, equal every time.

        Signs, equal on every device, unless a source draws otherwise.
        """
        shapes: dict[str, torch.Size] = {name: param.shape for name, param in active.items()}
        device = next(iter(active.values())).device
        return signs(shapes, key=key_of(seed, purpose, number), step=step, device=device)

    def gradient(self, active: Parameters, *, seed: int, step: int, scalars: tuple[float, ...]) -> dict[str, Tensor]:
        """Return ``sum_g c_g u_g`` by name, added in fp32 in the order of g."""
        return self.combined(active, seed=seed, step=step, scalars=scalars, purpose=PROBE)

    def combined(
        self, active: Parameters, *, seed: int, step: int, scalars: tuple[float, ...], purpose: str
    ) -> dict[str, Tensor]:
        """Return ``sum_g c_g u_g`` with the directions of a purpose."""
        total: dict[str, Tensor] = {}
        for number, scalar in enumerate(scalars):
            for name, value in self.draw(active, seed=seed, step=step, number=number, purpose=purpose).items():
                # Signs times a scalar are exact, so that fused and separate additions round alike.
                total[name] = value.mul_(scalar) if number == 0 else total[name].add_(value, alpha=scalar)
        return total

    def __call__(self, closure: Closure, params: Parameters) -> GradientEstimate:
        """Probe the micro-batch; the estimate of the whole step comes with its last one, and is zero before.

        Raises:
            TrainingError: the loss differences are rounding.
        """
        active = self.active(params, closure.step)
        total = self._directions * (1 if self._shared else closure.world_size)
        first = 0 if self._shared else self._directions * closure.rank
        own = range(first, first + self._directions)
        directions = [
            self.draw(active, seed=closure.run_seed, step=closure.step, number=number, purpose=PROBE) for number in own
        ]
        if self._epsilon is None:
            self._epsilon = self._measured(closure, directions)
        losses = closure.pair(directions, self._epsilon.value)
        self._sums = (self._sums or StepSums.zeros(total)).add(losses, own)
        if not closure.is_last:
            return GradientEstimate(_zero(active), torch.zeros((), dtype=torch.float64))
        sums, self._sums = StepSums.over_ranks(closure.gather(self._sums.flat())), None
        return self._estimate(closure, params, sums, self._epsilon)

    def surrogate(self, params: Parameters, *, seed: int, step: int, scalars: tuple[float, ...]) -> Tensor:
        """Return the scalar whose gradient is the step's estimate, from what a journal holds; once per step."""
        self._remember(scalars)
        active = self.active(params, step)
        gradient = self.gradient(active, seed=seed, step=step, scalars=scalars)
        return torch.stack([(param * gradient[name]).sum() for name, param in active.items()]).sum()

    def state_dict(self) -> dict[str, Any]:
        """Return epsilon and the running mean of the scalars' sizes."""
        epsilon = None if self._epsilon is None else [self._epsilon.value, self._epsilon.ratio]
        return {"epsilon": epsilon, "mean_size": self._mean_size, "sizes": self._sizes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``."""
        self._epsilon = None if state["epsilon"] is None else Epsilon(*state["epsilon"])
        self._mean_size, self._sizes = state["mean_size"], state["sizes"]

    @property
    def epsilon(self) -> Epsilon | None:
        """The step in use; None before the first probe."""
        return self._epsilon

    @epsilon.setter
    def epsilon(self, value: Epsilon) -> None:
        self._epsilon = value

    def _measured(self, closure: Closure, directions: list[dict[str, Tensor]]) -> Epsilon:
        def differences(epsilon: float) -> Tensor:
            losses = closure.pair(directions, epsilon)
            found = losses.plus - losses.minus
            return found[torch.isfinite(found)]

        def sum_over_ranks(values: list[float]) -> list[float]:
            return [sum(column) for column in zip(*closure.gather(values), strict=True)]

        if self._given is None:
            return choose_epsilon(differences, sum_over_ranks)
        return check_epsilon(self._given, differences, sum_over_ranks)

    def _estimate(self, closure: Closure, params: Parameters, sums: StepSums, epsilon: Epsilon) -> GradientEstimate:
        raw = tuple(p.scalar(epsilon.value, sums.targets) for p in sums.projections)
        scalars = self._without_outliers(raw)
        size = _root_mean_square(raw)
        error = _root_mean_square([p.standard_error(epsilon.value, sums.targets) for p in sums.projections])
        control = _root_mean_square([p.control(epsilon.value, sums.targets) for p in sums.projections])
        surrogate = self.surrogate(params, seed=closure.run_seed, step=closure.step, scalars=scalars)
        metrics = {
            "projected_gradient": size,
            "projected_gradient_se": error,
            "projected_gradient_shuffled": control,
            "signal_to_noise": size / error if error > 0 else math.nan,
            "epsilon": epsilon.value,
            "rounding_ratio": epsilon.ratio,
            "masked_examples": sums.left_out,
            "masked_directions": float(sum(scalar == 0 for scalar in scalars)),
        }
        loss = sums.loss / sums.targets if sums.targets else math.nan
        return GradientEstimate(surrogate, torch.tensor(loss, dtype=torch.float64), scalars, metrics)

    def _without_outliers(self, scalars: tuple[float, ...]) -> tuple[float, ...]:
        if self._outlier is None or self._sizes < _WARMUP:
            return scalars
        bound = self._outlier * self._mean_size
        return tuple(scalar if abs(scalar) <= bound else 0.0 for scalar in scalars)

    def _remember(self, scalars: tuple[float, ...]) -> None:
        for scalar in scalars:
            # A masked one counts as the bound: where all have become larger, the mean follows them.
            size = abs(scalar) if scalar or self._outlier is None else self._outlier * self._mean_size
            self._sizes += 1
            self._mean_size += (size - self._mean_size) / min(self._sizes, _MEMORY)


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def _zero(active: Parameters) -> Tensor:
    """Return a zero whose gradient is zero in the active parameters and in no other."""
    return torch.stack([param.flatten()[:0].sum() for param in active.values()]).sum()
