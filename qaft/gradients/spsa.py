"""SPSA: a two-point estimate with random signs for all parameters of any update.

    c = [F(theta + e u) - F(theta - e u)] / 2e,    estimate = c u,    u in {+1, -1}

Source: Spall, Multivariate stochastic approximation using a simultaneous perturbation gradient approximation (1992);
signs have the smallest variance of all distributions that are allowed there.
"""

from __future__ import annotations

from torch import Tensor, nn

from qaft.gradients.base import Parameters
from qaft.gradients.two_point import TwoPointSource
from qaft.philox import key_of, signs


class Spsa(TwoPointSource):
    """Gradient of whatever the update trains (rows, columns, factors, whole weights) from losses alone.

    Args:
        epsilon: see ``TwoPointSource``.
        directions: see ``TwoPointSource``.
        shared: see ``TwoPointSource``.
        outlier: see ``TwoPointSource``.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        *,
        epsilon: float | str = "auto",
        directions: int = 1,
        shared: bool = False,
        outlier: float | None = 20.0,
    ) -> None:
        super().__init__(epsilon=epsilon, directions=directions, shared=shared, outlier=outlier)

    def active(self, params: Parameters, step: int) -> dict[str, nn.Parameter]:
        """Return all parameters."""
        return dict(params)

    def draw(self, active: Parameters, *, seed: int, step: int, number: int, purpose: str) -> dict[str, Tensor]:
        """Return signs, equal on every device."""
        shapes = {name: param.shape for name, param in active.items()}
        device = next(iter(active.values())).device
        return signs(shapes, key=key_of(seed, purpose, number), step=step, device=device)
