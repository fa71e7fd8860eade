"""Every update on the same tasks at the same budgets: score, trainables, bytes kept for backward, tokens/s, exports.

    python tests/benchmarks/updates_compared.py --model FOLDER --data DIR [--encoder FOLDER] [--seeds 0 1 2]
    python tests/benchmarks/updates_compared.py --table

DIR has a folder for each task (mr, boolq, gsm8k) with ``train.jsonl`` and ``valid.jsonl``. Every finished cell is a line
of ``--cells``; what is there is not run again, so that a run can be stopped and continued. All linear layers of the
blocks are adapted, the base stays in 16 bits. The learning rate of an update is found from its typical value in factors
of three by the loss of short trainings on MR with its default options and a seed of their own, and is kept for all its
budgets and tasks; the next lower one is taken where the first cell with it does not score above the model as it was.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from compared_table import table
from compared_variants import Variant, selected, variants

RESULTS = Path(__file__).parent / "results"
TRIAL_STEPS = 12
LARGEST_EXPONENT = 4

Cell = dict[str, Any]


class Model(Protocol):
    """What trains and scores variants; ``Decoder`` and ``Encoder``."""

    name: str
    tasks: tuple[str, ...]
    steps: int
    ties: bool

    def size(self) -> dict[str, int]:
        """Return what budgets are counted from."""
        ...

    def untrained(self, task: str) -> float:
        """Return the score before training."""
        ...

    def cell(self, task: str, variant: Variant, lr: float, seed: int) -> dict[str, Any]:
        """Return the score and the costs of one training."""
        ...

    def trial(self, variant: Variant, lr: float, *, steps: int) -> float:
        """Return the loss of a short training."""
        ...


class Cells:
    """The finished cells, in a file of JSON lines.

    Args:
        path: of the file; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: list[Cell] = [json.loads(line) for line in lines]

    def find(self, **key: Any) -> Cell | None:
        """Return the row that has these values, or None."""
        return next((row for row in self.rows if all(row.get(k) == v for k, v in key.items())), None)

    def add(self, row: Cell) -> None:
        """Append a row to the file."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, file=sys.stderr, flush=True)


def rate(model: Model, variant: Variant, found: Iterable[Variant], cells: Cells) -> float:
    """Return the learning rate of an update: from its typical one by factors of 3 while trials get better."""
    default = next(v for v in found if v.name == variant.name)

    def loss(exponent: int) -> float:
        lr = _rate_at(default, exponent)
        if cells.find(model=model.name, diverged=default.name, lr=lr):
            return math.inf
        key = {"model": model.name, "trial": default.name, "lr": lr}
        row = cells.find(**key)
        if row is None:
            row = {**key, "loss": model.trial(default, lr, steps=TRIAL_STEPS), "steps": TRIAL_STEPS}
            cells.add(row)
        return math.inf if math.isnan(row["loss"]) else row["loss"]

    direction = 1 if loss(1) < loss(0) else -1
    best = max(direction, 0)
    while abs(best) < LARGEST_EXPONENT and loss(best + direction) < loss(best):
        best += direction
    return _rate_at(default, best)


def _rate_at(variant: Variant, exponent: int) -> float:
    return float(f"{variant.lr * 3.0**exponent:.3g}")


def wanted(model: Model, arguments: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """Yield (task, seed, budget), the most telling first."""
    tasks = [task for task in model.tasks if not arguments.tasks or task in arguments.tasks]
    yield from ((task, seed, "default") for seed in arguments.seeds for task in tasks)
    yield from ((task, seed, budget) for task in tasks for seed in arguments.seeds for budget in ("small", "rank 8"))


def run(model: Model, cells: Cells, arguments: argparse.Namespace) -> None:
    """Run every cell that is not there yet."""
    found = selected(variants(model.size(), ties=model.ties), arguments.updates)
    for task, seed, budget in wanted(model, arguments):
        common = {"model": model.name, "task": task}
        start = cells.find(**common, kind=None)
        if start is None:
            start = {**common, "kind": None, "score": model.untrained(task)}
            cells.add(start)
        for variant in (v for v in found if budget in v.budgets):
            key = {**common, "kind": variant.kind, "options": dict(variant.options), "seed": seed}
            while cells.find(**key) is None:
                lr = rate(model, variant, found, cells)
                measured = model.cell(task, variant, lr, seed)
                is_first = (task, seed, budget) == (model.tasks[0], arguments.seeds[0], "default")
                diverged = {"model": model.name, "diverged": variant.name, "lr": lr}
                if is_first and measured["score"] <= start["score"] and not cells.find(**diverged):
                    cells.add({**diverged, "score": measured["score"]})
                    continue
                labels = {"name": variant.name, "budgets": list(variant.budgets), "exports": variant.exports}
                cells.add({**key, **labels, "lr": lr, "steps": model.steps, **measured})


def models(arguments: argparse.Namespace) -> Iterator[Model]:
    """Yield the models that were asked for."""
    if arguments.encoder:
        from compared_encoder import Encoder

        yield Encoder(arguments.encoder, arguments.data, arguments.encoder_steps)
    if arguments.model:
        from compared_decoder import Decoder

        yield Decoder(arguments.model, arguments.data, arguments.steps)


def main() -> None:
    """Run what is missing, or print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="causal LM")
    parser.add_argument("--encoder", help="BERT-like encoder, mr only")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--encoder-steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--updates", nargs="+", default=[], help="names in the table; default: all")
    parser.add_argument("--cells", type=Path, default=RESULTS / "updates_compared.jsonl")
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    arguments = parser.parse_args()
    cells = Cells(arguments.cells)
    if arguments.table:
        print(table(cells.rows))
        return
    if arguments.data is None or not (arguments.model or arguments.encoder):
        parser.error("--data and one of --model and --encoder are needed")
    for model in models(arguments):
        run(model, cells, arguments)


if __name__ == "__main__":
    main()
