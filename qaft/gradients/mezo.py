"""MeZO: a two-point estimate with normal numbers, the baseline of LOZO.

    c = [F(theta + e z) - F(theta - e z)] / 2e,    estimate = c z,    z ~ N(0, I)

With ``update.kind: dense`` it is MeZO on whole weights, without its rounding: the published code adds and subtracts e z
in place, which moves every 16-bit weight by more than the training does. With ``lowrank`` it is MeZO-LoRA.

Source: arXiv 2305.17333, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qaft.gradients.base import Parameters
from qaft.gradients.two_point import TwoPointSource
from qaft.philox import hash64


class Mezo(TwoPointSource):
    """Gradient of whatever the update trains from losses alone, along normal directions.

    Its numbers come from torch's generators: the same on every machine of one kind of device, not between kinds.

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
        epsilon: float | str = 1e-3,
        directions: int = 1,
        shared: bool = False,
        outlier: float | None = 20.0,
    ) -> None:
        super().__init__(epsilon=epsilon, directions=directions, shared=shared, outlier=outlier)

    def draw(self, active: Parameters, *, seed: int, step: int, number: int, purpose: str) -> dict[str, Tensor]:
        """Return normal numbers; each parameter has its own generator, so that it depends on no other."""
        drawn = {}
        for name, param in active.items():
            generator = torch.Generator(param.device).manual_seed(hash64(seed, purpose, number, step, name) >> 1)
            drawn[name] = torch.randn(param.shape, generator=generator, device=param.device)
        return drawn
