"""The objective at one micro-batch, as gradient sources see it: one value, or losses on both sides of a probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qaft.errors import TrainingError
from qaft.gradients.base import Direction, PairedLosses
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.mode import evaluating
from qaft.layers.probe import probed, row_shares
from qaft.train.objective import MicroBatch, Objective

if TYPE_CHECKING:
    from qaft.train.engine import Engine


@dataclass(frozen=True, kw_only=True)
class BatchClosure:
    """``qaft.gradients.base.Closure`` over a micro-batch.

    Args:
        objective: what is minimised.
        engine: runs the model.
        batch: the micro-batch.
        noise_seed: of everything random in the forward pass.
        run_seed: seed of the run.
        is_last: whether the optimizer step is complete with this micro-batch.
    """

    objective: Objective
    engine: Engine
    batch: MicroBatch
    noise_seed: int
    run_seed: int
    is_last: bool

    @property
    def step(self) -> int:
        """Index of the optimizer step, from 0."""
        return self.batch.step

    @property
    def rank(self) -> int:
        """Index of this process."""
        return self.engine.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.engine.world_size

    def __call__(self) -> Tensor:
        """Return the value of the objective; see ``Objective``."""
        return self.objective(self.engine, self.batch, seed=self.noise_seed)

    def pair(self, directions: Sequence[Direction], epsilon: float) -> PairedLosses:
        """Return the losses of both signs, from one pass over the micro-batch beside itself.

        Nothing is kept for a backward pass, and the model is in evaluation mode: dropout would differ between signs.

        Raises:
            TrainingError: the loss comes in 16 bits.
            ModelError: a layer is not given the rows of the batch; see ``probed``.
        """
        examples, targets = self.batch.examples(), self.batch.example_targets()
        count, rows = len(targets), len(examples)
        layers = {name: m for name, m in self.objective.layers.items() if isinstance(m, AdaptedLinear)}
        inputs = {k: None if v is None else torch.cat([v, v]) for k, v in self.batch.loss_inputs().items()}
        with torch.inference_mode(), evaluating(self.engine.module), probed(layers, directions, epsilon, rows=rows):
            sums = self.engine(**inputs, groups=torch.cat([examples, examples + count]))
        if sums.dtype in (torch.float16, torch.bfloat16):
            raise TrainingError(
                f"{type(self.engine.module).__name__} returns losses in {sums.dtype}: a difference of two of them is "
                f"known to {torch.finfo(sums.dtype).eps:.1g} of the loss / 2 epsilon only; compute the loss in float32"
            )
        plus, minus = sums.double().cpu().split(count)
        direction = _directions(examples, len(directions))
        kept = targets > 0
        return PairedLosses(plus[kept], minus[kept], targets[kept], direction[kept])

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return every rank's values; see ``gathered``."""
        return gathered(self.engine, values)


def gathered(engine: Engine, values: Sequence[float]) -> list[list[float]]:
    """Return every rank's values, in the order of the ranks; collective.

    Each rank adds its own to zeros, so that nothing is rounded.
    """
    table = torch.zeros(engine.world_size, len(values), dtype=torch.float64)
    table[engine.rank] = torch.tensor(values, dtype=torch.float64)
    return (engine.sum_over_ranks(table).cpu() if engine.world_size > 1 else table).tolist()


def _directions(examples: Tensor, directions: int) -> Tensor:
    """Return the direction of each example, [N]."""
    of_row = torch.empty(len(examples), dtype=torch.int64)
    for index, share in enumerate(row_shares(len(examples), directions)):
        of_row[share.start : share.stop] = index
    first_of_row, last_of_row = examples[:, 0], examples[:, -1]
    return of_row.repeat_interleave(last_of_row - first_of_row + 1)
