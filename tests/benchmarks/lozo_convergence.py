"""Who learns from losses alone: LOZO, LOZO-M, MeZO, SPSA on rows and back-propagation, on one classification set.

    python tests/benchmarks/lozo_convergence.py --model FOLDER --data FOLDER [--steps 2000] [--seeds 0 1 2]

DATA holds train.jsonl and valid.jsonl with ``sentence`` and ``label``. Equal forwards: every zeroth-order method takes the
same steps of the same batches. Matched effective learning rates: LOZO(r, lr) has the first two moments of MeZO(r lr). The
control of a LOZO run is its own journal, replayed with the scalars permuted between the steps: the same directions and
step lengths without what was measured. A drop is that of the validation loss against the untrained model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from qaft.build import Run, build_run, restore_run
from qaft.commands.replay import replay_journal
from qaft.data import classification_items, load_samples
from qaft.evaluate.classification import verbalizer_accuracy
from qaft.evaluate.perplexity import samples_perplexity
from qaft.recipe import Recipe, parse_recipe
from qaft.train.loop import fit
from qaft.train.resume import start_state
from qaft.training import prepare_training

RANK = 2
BANK = {"kind": "bank", "rank": RANK, "blocks": 32}
CLASSES = {"prompt": "{sentence} It was", "verbalizers": {"0": " terrible", "1": " great"}}


def methods(lr: float) -> dict[str, dict[str, Any]]:
    """Sections of each method's recipe; ``lr`` is that of LOZO."""

    def plain(rate: float) -> dict[str, Any]:
        return {"name": "sgd", "lr": rate, "schedule": "constant", "warmup": 0, "clip": None}

    return {
        "LOZO, interval 50": {"update": BANK, "gradient": {"kind": "lozo", "interval": 50}, "optim": plain(lr)},
        "LOZO, interval 1": {"update": BANK, "gradient": {"kind": "lozo", "interval": 1}, "optim": plain(lr)},
        "LOZO-M": {"update": BANK, "gradient": {"kind": "lozo_m", "interval": 50}, "optim": plain(lr)},
        "MeZO": {"update": {"kind": "dense"}, "gradient": {"kind": "mezo"}, "optim": plain(RANK * lr)},
        "SPSA, 4 rows": {"update": {"kind": "roco", "rows": 4}, "gradient": {"kind": "spsa"}, "optim": plain(100 * lr)},
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
                "classification": CLASSES,
                "max_length": arguments.max_length,
                "packing": False,
                "limit": arguments.rows,
            },
            "train": {"steps": arguments.steps, "batch_size": arguments.batch, "seed": seed, "output": str(folder)},
            **sections,
        }
    )


def score(run: Run) -> tuple[float, float]:
    """Validation loss and accuracy."""
    model, tokenizer, section = run.loaded.model, run.loaded.tokenizer, run.recipe.data
    model.eval()
    perplexity = samples_perplexity(
        model, load_samples(section, tokenizer, "valid").samples, max_length=section.max_length
    )
    accuracy = verbalizer_accuracy(model, classification_items(section, tokenizer)).value
    return perplexity.nll / perplexity.tokens, accuracy


def trained(resolved: Recipe) -> Run:
    run = build_run(resolved)
    training = prepare_training(run)
    fit(training, start_state(training))
    return run


def control(arguments: argparse.Namespace, run: Run, seed: int) -> tuple[float, float]:
    out = run.folder.with_name(f"{run.folder.name}-shuffled")
    replay_journal(run.folder, base=arguments.model, out=out, shuffle=seed, console=Console(quiet=True))
    return score(restore_run(out))


def scores(arguments: argparse.Namespace, storage: str) -> dict[str, list[tuple[float, float]]]:
    """(loss, accuracy) of every seed by method."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, sections in methods(arguments.lr).items():
        if arguments.methods and name not in arguments.methods:
            continue
        for seed in arguments.seeds:
            resolved = recipe(arguments, storage, seed, name, sections)
            if "zero-shot" not in found:
                found["zero-shot"] = [score(build_run(resolved))]
            run = trained(resolved)
            found.setdefault(name, []).append(score(run))
            if name.startswith("LOZO,"):
                found.setdefault(f"{name}, scalars shuffled", []).append(control(arguments, run, seed))
            print(f"{storage} {name} seed {seed}: {found[name][-1]}", file=sys.stderr, flush=True)
    return found


def spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--storage", nargs="+", default=["bf16", "nf4"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--rows", type=int, default=None, help="use only the first rows of both files")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/lozo_convergence"))
    arguments = parser.parse_args()
    print(f"Command: `python tests/benchmarks/lozo_convergence.py {' '.join(sys.argv[1:])}`")
    print(
        f"{arguments.steps} steps of {arguments.batch} rows; mean and standard deviation of {len(arguments.seeds)} seeds.\n"
    )
    print("| storage | method | loss | drop | accuracy |\n|---|---|--:|--:|--:|")
    for storage in arguments.storage:
        found = scores(arguments, storage)
        start = found["zero-shot"][0][0]
        for name, values in found.items():
            losses = [loss for loss, _ in values]
            drops, accuracies = [start - loss for loss in losses], [100 * accuracy for _, accuracy in values]
            print(f"| {storage} | {name} | {spread(losses, 4)} | {spread(drops, 4)} | {spread(accuracies, 1)} % |")


if __name__ == "__main__":
    main()
