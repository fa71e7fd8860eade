"""SPSA: a two-point estimate with random signs for all parameters of any update.

    c = [F(theta + e u) - F(theta - e u)] / 2e,    estimate = c u,    u in {+1, -1}

Source: Spall, Multivariate stochastic approximation using a simultaneous perturbation gradient approximation (1992);
signs have the smallest variance of all distributions that are allowed there.
"""

from __future__ import annotations

from qaft.gradients.two_point import TwoPointSource


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
