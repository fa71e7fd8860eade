"""A two-point source on the blocks of a bank: what LOZO with and without momentum share."""

from __future__ import annotations

import re
from typing import Literal

from torch import Tensor, nn

from qaft.errors import RecipeError
from qaft.gradients.base import Parameters
from qaft.gradients.two_point import PROBE, TwoPointSource

Policy = Literal["bank", "growing"]
Compat = Literal["fixed", "paper", "official"]

REDRAWN = "redrawn"
"""Purpose of the random numbers with which the official code updates after it has drawn V."""

_BLOCK = re.compile(r".+\.blocks\.(\d+)")


class BlockSource(TwoPointSource):
    """Trains the blocks of ``update.kind: bank`` one after the other.

    Args:
        interval: steps before the next block's turn.
        policy: ``bank``: blocks take turns; ``growing``: each once.
        compat: ``fixed``: the official code's learning rate with its probe repaired; ``paper``: the learning rate is
            divided by the rank; ``official``: with the defect (see ``lozo.py``).
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
        interval: int,
        policy: Policy,
        compat: Compat,
        epsilon: float | str,
        directions: int,
        shared: bool,
        outlier: float | None,
    ) -> None:
        super().__init__(epsilon=epsilon, directions=directions, shared=shared, outlier=outlier)
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1 step; 50 is usual")
        if policy not in ("bank", "growing"):
            raise ValueError(f"policy={policy!r} must be bank (blocks take turns) or growing (each block once)")
        if compat not in ("fixed", "paper", "official"):
            raise ValueError(f"compat={compat!r} must be fixed, paper or official")
        self.interval, self.policy, self.compat = interval, policy, compat

    def active(self, params: Parameters, step: int) -> dict[str, nn.Parameter]:
        """Return the block whose turn it is, one parameter for each layer.

        Raises:
            RecipeError: parameters are not in blocks, or there are too few for the policy.
        """
        matches = {name: _BLOCK.fullmatch(name) for name in params}
        if strange := [name for name, match in matches.items() if match is None]:
            raise RecipeError(f"gradient: LOZO trains the blocks of update.kind bank; {strange[0]} is none")
        count = 1 + max(int(match[1]) for match in matches.values() if match is not None)
        turn = step // self.interval
        if self.policy == "growing" and turn >= count:
            raise RecipeError(
                f"gradient.policy=growing: step {step} begins block {turn + 1} of update.blocks={count}; "
                "set update.blocks to at least train.steps / gradient.interval, or gradient.policy to bank"
            )
        suffix = f".blocks.{turn % count}"
        return {name: param for name, param in params.items() if name.endswith(suffix)}

    def gradient(self, active: Parameters, *, seed: int, step: int, scalars: tuple[float, ...]) -> dict[str, Tensor]:
        """Return ``c U``, over the rank in the paper's convention."""
        refreshed = step % self.interval == 0
        purpose = REDRAWN if refreshed and self.compat == "official" else PROBE
        gradient = self.combined(active, seed=seed, step=step, scalars=scalars, purpose=purpose)
        if self.compat == "paper":
            return {name: value / value.shape[1] for name, value in gradient.items()}
        return gradient
