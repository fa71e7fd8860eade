"""Who learns from losses alone: LOZO, LOZO-M, MeZO, SPSA on rows and back-propagation, on one classification set.

    python tests/benchmarks/lozo_convergence.py --model FOLDER --data FOLDER [--steps 2000] [--seeds 0 1 2]
    python tests/benchmarks/lozo_convergence.py --table

DATA holds train.jsonl and valid.jsonl with ``sentence`` and ``label``. Equal forwards: every zeroth-order method takes the
same steps of the same batches. Matched effective learning rates: LOZO(r, lr) has the first two moments of MeZO(r lr).
Loss is that of the class's word alone, without the end token that would follow it; with --loss options it is that of the
choice between the words. The control of a LOZO run is its own
journal, replayed with the scalars permuted between the steps: the same directions and step lengths without what was
measured. A drop is that of the validation loss against the untrained model.

One cell is one method on one storage with one seed, a line of --cells. Finished cells are skipped: a run that was stopped
is started again with the same command, and --table prints what there is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from spread import spread

from qaft.build import Run, build_run, restore_run
from qaft.commands.replay import replay_journal
from qaft.data import classification_items
from qaft.data.batches import Batch
from qaft.evaluate.classification import verbalizer_accuracy
from qaft.recipe import Recipe, parse_recipe
from qaft.train.loop import fit
from qaft.train.loss import IGNORE_INDEX
from qaft.train.resume import start_state
from qaft.train.run import TrainingBatches
from qaft.training import prepare_training

RANK = 2
BANK = {"kind": "bank", "rank": RANK, "blocks": 32}
CLASSES = {"prompt": "{sentence} It was", "verbalizers": {"0": " terrible", "1": " great"}}
ZERO_SHOT, SHUFFLED = "zero-shot", ", scalars shuffled"
SIXTEEN_BITS_ONLY = ("MeZO",)
"""Methods whose trained values are whole weights, which a packed base does not have."""

CELLS = Path(__file__).parent / "results" / "lozo_convergence.jsonl"


def methods(lr: float, rows_lr: float) -> dict[str, dict[str, Any]]:
    """Sections of each method's recipe; ``lr`` is that of LOZO."""

    def losses(kind: str, rate: float, **options: Any) -> dict[str, Any]:
        optim = {"name": "sgd", "lr": rate, "schedule": "constant", "warmup": 0, "clip": None}
        return {"gradient": {"kind": kind, "epsilon": "auto", **options}, "optim": optim}

    return {
        "LOZO, interval 50": {"update": BANK, **losses("lozo", lr, interval=50)},
        "LOZO, interval 1": {"update": BANK, **losses("lozo", lr, interval=1)},
        "LOZO-M": {"update": BANK, **losses("lozo_m", lr, interval=50)},
        "MeZO": {"update": {"kind": "dense"}, **losses("mezo", RANK * lr)},
        "SPSA, 4 rows": {"update": {"kind": "roco", "rows": 4}, **losses("spsa", rows_lr)},
        "backprop LoRA": {
            "update": {"kind": "lowrank", "rank": 8},
            "gradient": {"kind": "backprop"},
            "optim": {"name": "adamw", "lr": 2e-4, "schedule": "constant", "warmup": 0},
        },
    }


def recipe(arguments: argparse.Namespace, storage: str, seed: int, name: str, sections: Mapping[str, Any]) -> Recipe:
    folder = arguments.out / storage / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}"
    return parse_recipe(
        {
            "model": {"name": arguments.model, "storage": storage, "dtype": arguments.dtype},
            "select": {"kind": "patterns", "targets": ["all"]},
            "data": {
                "train": str(arguments.data / "train.jsonl"),
                "valid": str(arguments.data / "valid.jsonl"),
                "format": "classification",
                "classification": {**CLASSES, "loss": arguments.loss},
                "max_length": arguments.max_length,
                "on_long": "drop",
                "packing": False,
            },
            "train": {"steps": arguments.steps, "batch_size": arguments.batch, "seed": seed, "output": str(folder)},
            **sections,
        }
    )


@dataclass(frozen=True)
class WithoutEnd:
    """Batches in which the token that ends a sample carries no loss; one process, one micro-batch per step."""

    batches: TrainingBatches
    end: int

    def from_step(self, step: int) -> Iterator[Batch]:
        for batch in self.batches.from_step(step):
            assert isinstance(batch, Batch)
            labels = batch.labels.masked_fill(batch.labels == self.end, IGNORE_INDEX)
            yield replace(batch, labels=labels, num_targets=int((labels[:, 1:] != IGNORE_INDEX).sum()))


def score(run: Run, rows: int) -> dict[str, float]:
    """Loss and accuracy on the first validation rows."""
    section = run.recipe.data.model_copy(update={"limit": rows})
    found = verbalizer_accuracy(run.loaded.model, classification_items(section, run.loaded.tokenizer))
    return {"loss": found.choice_loss if section.scores_options else found.loss, "accuracy": found.value}


def trained(resolved: Recipe) -> Run:
    run = build_run(resolved)
    shutil.rmtree(run.folder, ignore_errors=True)  # of a run that was stopped inside this cell
    training = prepare_training(run, console=Console(quiet=True))
    training = replace(training, eval_batches=None, diagnostics=None)
    if not resolved.data.scores_options:
        training = replace(training, batches=WithoutEnd(training.batches, run.loaded.tokenizer.eos_token_id))
    fit(training, start_state(training))
    return run


def control(arguments: argparse.Namespace, run: Run, seed: int) -> dict[str, float]:
    out = run.folder.with_name(f"{run.folder.name}-shuffled")
    shutil.rmtree(out, ignore_errors=True)
    replay_journal(run.folder, base=arguments.model, out=out, shuffle=seed, console=Console(quiet=True))
    return score(restore_run(out), arguments.eval_rows)


def cells_of(arguments: argparse.Namespace, storage: str, name: str, seed: int) -> dict[str, dict[str, float]]:
    """Train one cell; return what was measured by method, with that of its control."""
    sections = methods(arguments.lr, arguments.rows_lr)
    if name == ZERO_SHOT:
        resolved = recipe(arguments, storage, seed, name, sections["LOZO, interval 50"])
        return {name: score(build_run(resolved), arguments.eval_rows)}
    run = trained(recipe(arguments, storage, seed, name, sections[name]))
    found = {name: score(run, arguments.eval_rows)}
    if name.startswith("LOZO,"):
        found[name + SHUFFLED] = control(arguments, run, seed)
    return found


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "batch", "max_length", "eval_rows", "lr", "rows_lr", "dtype")
    # Only where it is not the default: cells that were finished before there was a choice keep their settings.
    chosen = {} if arguments.loss == "answer" else {"loss": arguments.loss}
    return {name: getattr(arguments, name) for name in names} | chosen


def read_cells(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def fill(arguments: argparse.Namespace) -> None:
    """Measure the cells that --cells lacks: one seed of everything before the next."""
    cells, settings = read_cells(arguments.cells), settings_of(arguments)
    if any(cell["settings"] != settings for cell in cells):
        raise SystemExit(f"{arguments.cells} holds cells of other settings than {settings}; give another --cells")
    done = {(cell["storage"], cell["method"], cell["seed"]) for cell in cells}
    names = [ZERO_SHOT, *methods(arguments.lr, arguments.rows_lr)]
    for seed in arguments.seeds:
        for storage in arguments.storage:
            for name in names:
                packed_weights = storage != "bf16" and name in SIXTEEN_BITS_ONLY
                again = name == ZERO_SHOT and seed != arguments.seeds[0]
                skipped = arguments.methods and name not in (ZERO_SHOT, *arguments.methods)
                if packed_weights or again or skipped or (storage, name, seed) in done:
                    continue
                started = time.perf_counter()
                found = cells_of(arguments, storage, name, seed)
                common = {"storage": storage, "seed": seed, "seconds": round(time.perf_counter() - started)}
                lines = [
                    json.dumps({**common, "method": method, **values, "settings": settings})
                    for method, values in found.items()
                ]
                with arguments.cells.open("a") as file:
                    file.write("".join(f"{line}\n" for line in lines))
                print("\n".join(lines), file=sys.stderr, flush=True)


def table(cells: list[dict[str, Any]]) -> str:
    """Return the cells as Markdown: mean and standard deviation over seeds."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        rows.setdefault((cell["storage"], cell["method"]), []).append(cell)
    lines = ["| storage | method | seeds | loss | drop | accuracy |", "|---|---|--:|--:|--:|--:|"]
    for (storage, method), found in sorted(rows.items(), key=lambda row: row[0][0]):
        start = rows[storage, ZERO_SHOT][0]["loss"]
        losses, accuracies = [cell["loss"] for cell in found], [100 * cell["accuracy"] for cell in found]
        drop = "" if method == ZERO_SHOT else spread([start - loss for loss in losses], 3)
        loss, accuracy = spread(losses, 3), spread(accuracies, 1)
        lines.append(f"| {storage} | {method} | {len(found)} | {loss} | {drop} | {accuracy} % |")
    return "\n".join(lines)


def main() -> None:
    """Fill the cells, then print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--storage", nargs="+", default=["bf16", "nf4"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=96, help="longer rows are dropped")
    parser.add_argument("--eval-rows", type=int, default=300, help="first rows of valid.jsonl")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--rows-lr", type=float, default=1e-4, help="of SPSA on rows, whose gradient is smaller")
    parser.add_argument("--loss", choices=["answer", "options"], default="answer", help="what every method trains on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/lozo_convergence"))
    parser.add_argument("--cells", type=Path, default=CELLS, help="one JSON line for each finished cell")
    parser.add_argument("--table", action="store_true", help="only print the table of --cells")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.model is None or arguments.data is None:
            parser.error("--model and --data are needed, or --table")
        fill(arguments)
    cells = read_cells(arguments.cells)
    if not cells:
        raise SystemExit(f"{arguments.cells}: no finished cell")
    given = ", ".join(f"{name} {value}" for name, value in cells[0]["settings"].items())
    print(f"{given}; mean and standard deviation over seeds.\n\n{table(cells)}")


if __name__ == "__main__":
    main()
