"""WikiText-2 perplexity of SmolLM2 in 16 bits, rounded to int4, rotated and rounded, and trained through the int4 grid.

    python tests/benchmarks/wikitext.py --model FOLDER --data DIR [--steps 60] [--group-size N] [--out FILE]

DIR holds ``train.jsonl`` and ``valid.jsonl`` with a ``text`` field. All linear layers of the blocks are quantized, per output
channel unless a group size is given; the quantization-aware run trains q_proj and v_proj only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from qaft.build import build_run
from qaft.evaluate.perplexity import text_perplexity
from qaft.evaluate.unpacked import unpacked
from qaft.models.load import load_model
from qaft.recipe import Recipe, parse_recipe
from qaft.train.loop import fit
from qaft.train.resume import start_state
from qaft.training import prepare_training

LENGTH = 1024


def recipe_of(arguments: argparse.Namespace, *, qat: bool, rotation: str = "none", train: bool = True) -> Recipe:
    """Return the recipe of one row of the table."""
    grid = {"bits": 4, "group_size": arguments.group_size, "symmetric": True}
    return parse_recipe(
        {
            "model": {"name": arguments.model, "storage": "int4" if qat else "bf16"},
            "update": {"kind": "dense"},
            "qat": {"weights": grid, "rotation": rotation} if qat else None,
            "optim": {"lr": arguments.lr, "warmup": 0.05},
            "data": {
                "train": str(arguments.data / "train.jsonl"),
                "format": "text",
                "max_length": 256,
                "on_long": "split",
            },
            "train": {
                "steps": arguments.steps,
                "batch_size": 4,
                "seed": arguments.seed,
                "log_every": 10,
                "output": tempfile.mkdtemp(),
            },
        }
    )


def perplexity(model: torch.nn.Module, tokenizer: object, arguments: argparse.Namespace) -> float:
    """Return the perplexity of the first ``arguments.tokens`` tokens of the validation articles, in blocks of 1024."""
    lines = (arguments.data / "valid.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n\n".join(json.loads(line)["text"] for line in lines)
    ids = torch.tensor(tokenizer(text).input_ids)[: arguments.tokens]  # type: ignore[operator]
    with unpacked(model):
        return text_perplexity(model, ids, max_length=LENGTH).value


def trained(recipe: Recipe, arguments: argparse.Namespace) -> float:
    """Train a recipe and return the perplexity."""
    run = build_run(recipe)
    training = prepare_training(run)
    fit(training, start_state(training))
    return perplexity(run.loaded.model, run.loaded.tokenizer, arguments)


def untrained(recipe: Recipe, arguments: argparse.Namespace) -> float:
    """Return the perplexity of the recipe's base model as it is loaded."""
    loaded = load_model(recipe.model, qat=recipe.qat)
    return perplexity(loaded.model, loaded.tokenizer, arguments)


def rows(arguments: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Yield (name, perplexity)."""
    yield "16-bit base", untrained(recipe_of(arguments, qat=False), arguments)
    yield "int4 RTN", untrained(recipe_of(arguments, qat=True), arguments)
    yield "int4 RTN, rotated (R1, R2)", untrained(recipe_of(arguments, qat=True, rotation="hadamard"), arguments)
    yield "16-bit, q and v trained", trained(recipe_of(arguments, qat=False), arguments)
    yield "int4 QAT, q and v trained", trained(recipe_of(arguments, qat=True), arguments)
    rotated = recipe_of(arguments, qat=True, rotation="hadamard")
    yield "int4 QAT, rotated, q and v trained", trained(rotated, arguments)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--group-size", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=20_460)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    grid = "per channel" if arguments.group_size is None else f"groups of {arguments.group_size}"
    lines = [
        f"Command: `python tests/benchmarks/wikitext.py {' '.join(sys.argv[1:])}`",
        f"int4 symmetric {grid}; {arguments.steps} steps of 4 x 256 tokens, seed {arguments.seed}; {arguments.tokens} tokens.",
        "",
        "| model | perplexity |",
        "|---|--:|",
    ]
    for name, value in rows(arguments):
        lines.append(f"| {name} | {value:.2f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
