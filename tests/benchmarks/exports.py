"""Every export format of one short run: its size, who loads it, and how far that is from the trained model.

    python tests/benchmarks/exports.py --model FOLDER --data DIR [--steps 4] [--tokens 4092] [--formats NAME ...] [--out FILE]

DIR holds ``train.jsonl`` and ``valid.jsonl`` with a ``text`` field. Each format is trained on its own grid. The difference is
the largest one of two fp32 logits relative to the largest logit of its token, between the run in memory and a fresh process
that loads the folder; perplexities are of the run in memory and of the folder as its client loads it, in 16 bits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from wikitext import perplexity

from qaft.build import Run, build_run
from qaft.commands.export import export_run
from qaft.models.plain import load_plain
from qaft.recipe import Recipe, parse_recipe
from qaft.train.loop import fit
from qaft.train.resume import start_state
from qaft.training import prepare_training

INT = {"kind": "int", "group_size": 64}
CHANNEL = {"kind": "int", "group_size": None}
CASES: dict[str, dict[str, Any]] = {
    "merged, bf16": {"qat": {"weights": INT}, "storage": "int4", "format": "merged"},
    "merged, original basis": {"qat": {"weights": INT}, "storage": "int4", "format": "merged", "basis": "original"},
    "compressed-tensors, W4A16": {"qat": {"weights": INT}, "storage": "int4", "format": "compressed-tensors"},
    "compressed-tensors, W8A16": {
        "qat": {"weights": {**INT, "bits": 8}},
        "storage": "int8_group",
        "format": "compressed-tensors",
    },
    "compressed-tensors, W8A8": {
        "qat": {"weights": {**CHANNEL, "bits": 8}, "activations": {"bits": 8}},
        "storage": "int8_group",
        "format": "compressed-tensors",
    },
    "compressed-tensors, W4A8": {
        "qat": {"weights": INT, "activations": {"bits": 8}},
        "storage": "int4",
        "format": "compressed-tensors",
    },
    "compressed-tensors, W4A4": {
        "qat": {"weights": INT, "activations": {"bits": 4}},
        "storage": "int4",
        "format": "compressed-tensors",
    },
    "bnb, nf4": {"qat": {"weights": {"kind": "nf4"}}, "storage": "nf4", "format": "bnb"},
    "bnb, fp4": {"qat": {"weights": {"kind": "fp4"}}, "storage": "fp4", "format": "bnb"},
    "bnb, int8": {"qat": {"weights": {**CHANNEL, "bits": 8}}, "storage": "int8", "format": "bnb"},
    "gguf, q4_0": {"qat": {"weights": {"kind": "q4_0"}}, "storage": "int4", "format": "gguf"},
    "gguf, q8_0": {"qat": {"weights": {"kind": "q8_0"}}, "storage": "int8_group", "format": "gguf"},
    "gguf, mxfp4": {"qat": {"weights": {"kind": "mxfp4"}}, "storage": "bf16", "format": "gguf"},
    "gguf, bf16": {"qat": None, "storage": "bf16", "format": "gguf"},
    "gptq, int4": {"qat": {"weights": INT}, "storage": "int4", "format": "gptq", "model_dtype": "float16"},
    "gptq, int8": {
        "qat": {"weights": {**INT, "bits": 8}},
        "storage": "int8_group",
        "format": "gptq",
        "model_dtype": "float16",
    },
    "peft": {"qat": None, "storage": "bf16", "format": "peft", "update": {"kind": "lowrank", "rank": 8}},
    "patch": {"qat": {"weights": INT}, "storage": "int4", "format": "patch", "update": {"kind": "roco", "rows": 4}},
}
CLIENTS = {
    "merged": ("transformers",),
    "compressed-tensors": ("transformers", "compressed-tensors"),
    "bnb": ("transformers", "bitsandbytes"),
    "gguf": ("transformers", "gguf"),
    "gptq": (),
    "peft": ("transformers", "peft"),
    "patch": ("qaft",),
}


def recipe_of(arguments: argparse.Namespace, case: dict[str, Any]) -> Recipe:
    """Return the recipe of one format."""
    qat = case["qat"]
    return parse_recipe(
        {
            "model": {
                "name": str(arguments.model),
                "storage": case["storage"],
                "dtype": case.get("model_dtype", "bfloat16"),
            },
            "update": case.get("update", {"kind": "dense"}),
            "qat": None if qat is None else {**qat, "rotation": "none" if case["format"] == "patch" else "hadamard"},
            "optim": {"lr": 1e-4, "warmup": 0},
            "data": {
                "train": str(arguments.data / "train.jsonl"),
                "format": "text",
                "max_length": 256,
                "on_long": "split",
            },
            "train": {"steps": arguments.steps, "batch_size": 2, "log_every": 100, "output": tempfile.mkdtemp()},
            "export": [{"format": case["format"], **({"basis": case["basis"]} if "basis" in case else {})}],
        }
    )


def trained(recipe: Recipe) -> Run:
    """Train a recipe."""
    run = build_run(recipe)
    training = prepare_training(run, console=Console(quiet=True))
    fit(training, start_state(training))
    return run


def reloaded_perplexity(folder: Path, format: str, arguments: argparse.Namespace) -> float | None:
    """Return the perplexity of an exported folder in its own client; None where that does not run here."""
    if format in ("patch", "gptq"):
        return None
    file = next(iter(folder.glob("*.gguf")), folder)
    model, tokenizer = load_plain(str(file), dtype=torch.bfloat16 if format == "gguf" else None)
    return perplexity(model, tokenizer, arguments)


def row(name: str, case: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Return the line of one format."""
    run = trained(recipe_of(arguments, case))
    live = perplexity(run.loaded.model, run.loaded.tokenizer, arguments)
    report = export_run(run, run.recipe.export[0], Console(quiet=True))
    weights = sum(size for file, size in report.sizes.items() if file.endswith((".safetensors", ".gguf")))
    found = reloaded_perplexity(report.folder, case["format"], arguments)
    clients = ", ".join(f"{client} {version(client)}" for client in CLIENTS[case["format"]]) or "read field by field"
    difference = "" if report.difference is None else f"{report.difference.max_relative:.1e}"
    return (
        f"| {name} | {weights / 2**20:.1f} | {clients} | {difference} | {live:.3f} | "
        f"{'' if found is None else f'{found:.3f}'} |"
    )


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4092)
    parser.add_argument("--formats", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [
        f"Command: `python tests/benchmarks/exports.py {' '.join(sys.argv[1:])}`",
        f"{arguments.steps} steps of 2 x 256 tokens on q_proj and v_proj; perplexity on {arguments.tokens} tokens.",
        "",
        "| export | MiB of weights | client | max relative logit difference | perplexity, trained | perplexity, client |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for name in arguments.formats:
        lines.append(row(name, CASES[name], arguments))
        print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
