"""LOZO-M: LOZO with momentum, kept for each block.

    N_p <- beta N_p + (1 - beta) c U,    A_p <- A_p - lr N_p

The published form projects N onto each new V, which keeps a fraction sqrt(r / n) of it (2 % at r = 2, n = 4096): in
effect it starts again every ``interval`` steps. Here a block finds its momentum as it left it when its turn returns.

Source: arXiv 2410.07698, section 4; the official code starts with N = c U (``compat: official``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qaft.gradients.base import Parameters
from qaft.gradients.blocks import BlockSource, Compat, Policy


class LozoM(BlockSource):
    """Smoothed gradient of one block of ``update.kind: bank``; one fp32 value of state for each trained one.

    Args:
        interval: steps before the next block's turn.
        epsilon: see ``TwoPointSource``.
        momentum: beta.
        policy: see ``BlockSource``.
        compat: see ``BlockSource``.
        directions: see ``TwoPointSource``.
        shared: see ``TwoPointSource``.
        outlier: see ``TwoPointSource``.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        *,
        interval: int = 50,
        epsilon: float | str = "auto",
        momentum: float = 0.9,
        policy: Policy = "bank",
        compat: Compat = "fixed",
        directions: int = 1,
        shared: bool = False,
        outlier: float | None = 20.0,
    ) -> None:
        super().__init__(
            interval=interval,
            policy=policy,
            compat=compat,
            epsilon=epsilon,
            directions=directions,
            shared=shared,
            outlier=outlier,
        )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be in [0, 1); 0.9 is usual")
        self.beta = momentum
        self._momentum: dict[str, Tensor] = {}

    def gradient(self, active: Parameters, *, seed: int, step: int, scalars: tuple[float, ...]) -> dict[str, Tensor]:
        """Return N of the block after adding ``c U``."""
        fresh = super().gradient(active, seed=seed, step=step, scalars=scalars)
        for name, value in fresh.items():
            before = self._momentum.get(name)
            # Two roundings on every device: a fused multiply and add would differ between them.
            scaled = value if before is None and self.compat == "official" else value.mul_(1 - self.beta)
            self._momentum[name] = scaled if before is None else (before * self.beta).add_(scaled)
        return {name: self._momentum[name] for name in active}

    def state_dict(self) -> dict[str, Any]:
        """Return the momentum of all blocks that had a turn, and what every two-point source keeps."""
        return {**super().state_dict(), "momentum": dict(self._momentum)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``."""
        super().load_state_dict(state)
        self._momentum = {name: value.clone() for name, value in state["momentum"].items()}
