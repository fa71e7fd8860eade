"""LOZO: low-rank two-point estimates on a bank of random subspaces.

    c = [F(W + e U V_p^T) - F(W - e U V_p^T)] / 2e,    A_p <- A_p - lr c U,    W = W0 + sum_p A_p V_p^T

U is fresh in every step, the block p changes every ``interval`` steps. ``policy: bank`` lets the blocks take turns (the
rank stays bounded and the state is a LoRA); ``policy: growing`` uses each once, which is LOZO as published.

Source: arXiv 2410.07698. U and V hold signs instead of normal numbers: the same first and second moments, exact on
every device. In the step in which V is new, the published code draws other numbers for the update than for the probe,
so that this step is noise (``interval: 1`` never learns there); ``compat: official`` does the same, for comparison.
"""

from __future__ import annotations

from qaft.gradients.blocks import BlockSource, Compat, Policy


class Lozo(BlockSource):
    """Gradient of one block of ``update.kind: bank`` from losses alone.

    Args:
        interval: steps before the next block's turn.
        epsilon: see ``TwoPointSource``.
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
