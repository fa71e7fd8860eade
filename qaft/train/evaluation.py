"""Mean loss over the targets of validation batches, through the same forward that is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from qaft.errors import DataError
from qaft.layers.mode import evaluating
from qaft.train.objective import MicroBatch, local_targets

if TYPE_CHECKING:
    from qaft.train.engine import Engine


def evaluate(
    engine: Engine, batches: Iterable[MicroBatch], *, interrupted: Callable[[], bool] = lambda: False
) -> float | None:
    """Return the mean loss per target in nats over all ranks' batches, or None when any rank was interrupted.

    The module is in evaluation mode (no dropout, no noise) meanwhile and in training mode afterwards. Ranks may hold
    different numbers of batches.

    Args:
        engine: runs the model.
        batches: this rank's batches; sums are kept in fp64, so the result does not depend on how rows are batched.
        interrupted: asked between batches; a long evaluation must not delay the checkpoint of a run that has to stop.

    Raises:
        DataError: no position of any batch carries loss.
    """
    total, targets, stopped = 0.0, 0, False
    with evaluating(engine.module), torch.no_grad():
        for batch in batches:
            if stopped := interrupted():
                break
            total += float(engine(**batch.loss_inputs()))
            targets += local_targets(batch)
    sums = engine.sum_over_ranks(torch.tensor([total, targets, stopped], dtype=torch.float64)).tolist()
    if sums[2]:
        return None
    if not sums[1]:
        raise DataError("data.valid: no position carries loss, so there is nothing to evaluate; check data.train_on")
    return sums[0] / sums[1]
