"""A training step through the grid beside the same step without it: what quantization-aware training costs.

    python tests/benchmarks/qat_step.py [--model FOLDER] [--batch 4] [--length 256] [--rounds 8] [--out FILE]

Each pair has the same model, scope, update, batch and int4 storage of everything that is not trained; the second of a
pair also fake-quantizes what is trained (groups of 64). Without ``--model`` it is a random Llama of two blocks
with the widths of a 7B (``--hidden`` and others), for GPUs. Steps of both take turns, and the best counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_checkpoint import write_checkpoint

from qaft.build import build_run
from qaft.layers.attach import trainable_parameters
from qaft.recipe import parse_recipe
from qaft.train.engine import AccelerateEngine
from qaft.train.groups import param_groups
from qaft.train.loss import CausalLoss
from qaft.train.optimizers import make_optimizer

LORA = {"kind": "lowrank", "rank": 8, "alpha": 16}
SCOPES: dict[str, tuple[list[str], dict[str, Any], float]] = {
    "q and v, dense": (["q_proj", "v_proj"], {"kind": "dense"}, 1.15),
    "all linear, LoRA": (["all"], LORA, 1.5),
}
"""Scope -> layers, update, and the ratio aimed at."""


def make_step(model: str, targets: list[str], update: dict[str, Any], *, qat: bool, fused: bool) -> Callable[..., None]:
    weights = {"bits": 4, "group_size": 64, "fused": fused}
    recipe = parse_recipe(
        {
            "model": {"name": model, "storage": "int4", "dtype": "bfloat16", **({} if qat else {"group_size": 64})},
            "select": {"targets": targets},
            "update": update,
            "optim": {"lr": 1e-4, "clip": None},
            **({"qat": {"weights": weights}} if qat else {}),
        }
    )
    run = build_run(recipe)
    params = trainable_parameters(run.loaded.model)
    optimizer = make_optimizer(param_groups(params.items(), recipe.optim), recipe.optim, run.device)
    engine = AccelerateEngine(CausalLoss(run.loaded.model), optimizer, clip=None, cpu=run.device.type == "cpu")

    def step(ids: torch.Tensor, labels: torch.Tensor) -> None:
        engine.backward(engine(input_ids=ids, labels=labels) / int((labels[:, 1:] != -100).sum()))
        engine.step()

    return step


def measure(steps: list[Callable[..., None]], ids: torch.Tensor, rounds: int) -> list[float]:
    best = [float("inf")] * len(steps)
    for turn in range(rounds + 1):
        for index, step in enumerate(steps):
            start = time.perf_counter()
            step(ids, ids.clone())
            if ids.is_cuda:
                torch.cuda.synchronize()
            if turn:
                best[index] = min(best[index], time.perf_counter() - start)
    return best


def table(model: str, arguments: argparse.Namespace, device: torch.device) -> list[str]:
    vocabulary = 264 if arguments.model is None else 40_000
    ids = torch.randint(0, vocabulary, (arguments.batch, arguments.length), device=device)
    lines = ["| scope | without QAT, ms | with QAT, ms | ratio | aim |", "|---|--:|--:|--:|--:|"]
    for scope, (targets, update, aim) in SCOPES.items():
        plain = make_step(model, targets, update, qat=False, fused=False)
        grid = make_step(model, targets, update, qat=True, fused=device.type == "cpu")
        without, with_grid = measure([plain, grid], ids, arguments.rounds)
        milliseconds = f"{without * 1e3:.0f} | {with_grid * 1e3:.0f}"
        lines.append(f"| {scope} | {milliseconds} | {with_grid / without:.2f} | {aim} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the base model; default: random weights of the sizes below")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    with tempfile.TemporaryDirectory() as scratch:
        sizes = {
            "hidden_size": arguments.hidden,
            "intermediate_size": arguments.intermediate,
            "num_hidden_layers": arguments.layers,
            "num_attention_heads": arguments.hidden // 128,
            "num_key_value_heads": arguments.hidden // 128,
            "max_position_embeddings": max(512, arguments.length),
        }
        model = arguments.model or str(write_checkpoint(Path(scratch), **sizes))
        lines = [
            f"Command: `python tests/benchmarks/qat_step.py {' '.join(sys.argv[1:])}`",
            f"{where}; {arguments.batch} x {arguments.length} tokens per step; best of {arguments.rounds}.",
            "",
            *table(model, arguments, device),
        ]
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
