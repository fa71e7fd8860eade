"""One of two processes: ``zeroth_order_ranks.py FOLDER CHECKPOINT`` trains every case of ``CASES``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tiny_job import job

from qaft.build import build_run
from qaft.recipe import parse_recipe
from qaft.train.loop import fit
from qaft.train.resume import start_state
from qaft.training import prepare_training

LOZO = {"kind": "lozo", "interval": 2, "epsilon": 2.0**-10, "outlier": None}
CASES: dict[str, dict[str, Any]] = {
    "private": {"gradient": LOZO},
    "shared": {"gradient": {**LOZO, "shared": True}},
    "accumulated": {"gradient": LOZO, "train": {"batch_size": 4, "grad_accumulation": 2}},
}


def recipe(checkpoint: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return job(
        checkpoint,
        folder,
        **{
            "update": {"kind": "bank", "rank": 2, "blocks": 2},
            "optim": {"name": "sgd", "lr": 3e-4, "clip": None},
            **sections,
            "train": {"steps": 5, "save_every": 2, **sections.get("train", {})},
        },
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, sections in CASES.items():
        # Not the whole command, which leaves the process group at its end.
        training = prepare_training(
            build_run(parse_recipe(recipe(Path(sys.argv[2]), Path(sys.argv[1]) / name, **sections)))
        )
        fit(training, start_state(training))
