"""launch/train.py with one rank that fails before a step: FAULT="RANK STEP KIND", KIND is kill, data or defect.

Ranks that torchrun has started again do not fail.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import qaft.cli
from qaft.data.batches import TrainBatches
from qaft.errors import DataError

RANK, STEP, KIND = os.environ["FAULT"].split()
from_step = TrainBatches.from_step


def fail() -> None:
    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise DataError("rows.jsonl, line 7: broken") if KIND == "data" else ZeroDivisionError("a defect")


def faulty(self: TrainBatches, step: int) -> Iterator[Any]:
    for batch in from_step(self, step):
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if os.environ.get("RANK") == RANK and batch.step == int(STEP) and not again:
            fail()
        yield batch


TrainBatches.from_step = faulty
qaft.cli.main(["train", *sys.argv[1:]])
