"""A LOZO step beside two plain forward passes of the same tokens: time, memory above the weights, bytes written to the base.

    python tests/benchmarks/lozo_step.py --model FOLDER [--storage bf16 nf4] [--rows 16] [--tokens 64] [--rounds 5]

One process, one batch, every third position with loss; rounds of both alternate and the best of each counts. "Plain" is
the frozen model without any layer of ours, through the same loss (which builds no logits without a target) and as
transformers computes it. Memory is what the allocator hands out, not what the process holds (it keeps what was freed).
It is compared with the sum of what a step needs:

    A 4 R sum(m) + signs R sum(n) / 8 + one block 3 * 4 r sum(m)
      + max( both signs in the widest place, an MLP: 2 bytes * 2 rows tokens (2 hidden + 3 intermediate),
             the same with 2 intermediate and the largest layer, dequantized,
             the head: 2 bytes * 2 rows tokens 2 hidden + one chunk of logits )

and the same formula, with the packed weights, gives the last lines, for 7B and 13B.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, PretrainedConfig

from qaft.build import Run, build_run
from qaft.data.batches import Batch
from qaft.gradients.epsilon import Epsilon
from qaft.models.load import load_model
from qaft.recipe import Recipe, parse_recipe
from qaft.train.closure import BatchClosure
from qaft.train.journal import base_digest
from qaft.train.loss import LOGITS_PER_CHUNK, CausalLoss
from qaft.train.replay import two_point
from qaft.train.run import TrainRun
from qaft.training import prepare_replay

GIB = 2**30
RANK, BLOCKS = 2, 32
SIZES = {
    "7B": {"hidden": 4096, "intermediate": 11008, "layers": 32, "key_value": 4096, "vocabulary": 32000},
    "13B": {"hidden": 5120, "intermediate": 13824, "layers": 40, "key_value": 5120, "vocabulary": 32000},
}
NF4_BITS = 4.127
"""Bits per weight of NF4 with double quantization: 4 + 8 / 64 + 32 / (64 * 256)."""

CONTEXT = 0.5 * GIB
"""What a GPU process holds besides tensors."""


def synthetic(rows: int, tokens: int, vocabulary: int) -> Batch:
    """Random tokens; every third position carries loss."""
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(tokens) % 3 == 0, ids, -100)
    positions = torch.arange(tokens).expand_as(ids)
    return Batch(ids, labels, positions, None, int((labels[:, 1:] != -100).sum()), ids.numel(), 0)


def shape_of(config: PretrainedConfig) -> dict[str, int]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "key_value": head * config.num_key_value_heads,
        "vocabulary": config.vocab_size,
    }


def linears(shape: dict[str, int]) -> list[tuple[int, int]]:
    """(m, n) of all linear layers of the blocks."""
    h, f, kv = shape["hidden"], shape["intermediate"], shape["key_value"]
    return [(h, h), (kv, h), (kv, h), (h, h), (f, h), (f, h), (h, f)] * shape["layers"]


def budget(shape: dict[str, int], tokens: int, *, gpu: bool) -> float:
    """Bytes above the weights for a micro-batch of ``tokens`` tokens on each side.

    On a GPU a whole chunk of logits goes through the softmax in fp32 at once: 2 + 4 + 4 bytes for each.
    """
    layers = linears(shape)
    outputs, inputs = sum(m for m, _ in layers), sum(n for _, n in layers)
    state = 4 * RANK * BLOCKS * outputs + RANK * BLOCKS * inputs / 8
    step = 3 * 4 * RANK * outputs
    largest = 2 * max(m * n for m, n in layers)
    hidden, intermediate = (2 * 2 * tokens * shape[name] for name in ("hidden", "intermediate"))
    logits = (10 if gpu else 2) * max(LOGITS_PER_CHUNK, 16 * shape["vocabulary"])
    places = (2 * hidden + 3 * intermediate, 2 * hidden + 2 * intermediate + largest, 2 * hidden + logits)
    return state + step + max(places)


def packed(shape: dict[str, int]) -> float:
    """Bytes of the weights in NF4 with embeddings and head in 16 bits."""
    return sum(m * n for m, n in linears(shape)) * NF4_BITS / 8 + 2 * 2 * shape["vocabulary"] * shape["hidden"]


def recipe(arguments: argparse.Namespace, storage: str) -> Recipe:
    return parse_recipe(
        {
            "model": {"name": arguments.model, "storage": storage, "dtype": "bfloat16"},
            "select": {"kind": "patterns", "targets": ["all"]},
            "update": {"kind": "bank", "rank": RANK, "blocks": BLOCKS},
            "gradient": {"kind": "lozo", "outlier": None},
            "optim": {"name": "sgd", "lr": 1e-6, "clip": None},
            "train": {"output": str(arguments.out)},
        }
    )


def best_seconds(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(actions, float("inf"))
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak_above(action: Callable[[], Any]) -> float:
    """Bytes that an action allocates at its peak above what is in use before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def step_of(training: TrainRun, batch: Batch) -> Callable[[], None]:
    closure = BatchClosure(
        objective=training.objective,
        engine=training.engine,
        batch=batch,
        noise_seed=0,
        run_seed=0,
        is_last=True,
    )

    def step() -> None:
        training.engine.backward(training.source(closure, training.params).surrogate)
        training.engine.step()

    return step


def forwards(recipe: Recipe, batch: Batch, device: torch.device) -> dict[str, Callable[[], None]]:
    model: Any = load_model(recipe.model, qat=None, device=device).model.to(device).eval()
    loss = CausalLoss(model)
    inputs = {name: getattr(batch, name).to(device) for name in ("input_ids", "labels", "position_ids")}

    def ours() -> None:
        with torch.inference_mode():
            for _ in range(2):
                loss(**inputs)

    def theirs() -> None:
        with torch.inference_mode():
            for _ in range(2):
                model(**inputs, use_cache=False)

    return {"two forwards, same loss": ours, "two forwards, transformers": theirs}


def measure(arguments: argparse.Namespace, storage: str) -> list[str]:
    resolved = recipe(arguments, storage)
    run: Run = build_run(resolved)
    shape = shape_of(AutoConfig.from_pretrained(run.loaded.source.folder))
    batch = synthetic(arguments.rows, arguments.tokens, shape["vocabulary"])
    training, before = prepare_replay(run), base_digest(run.loaded.model)
    # Random tokens: the time of a step is asked for, not whether its epsilon suits them.
    two_point(training).epsilon = Epsilon(2.0**-10, 1.0)
    step = step_of(training, batch)
    step()
    # The state is there already: what a step adds to it.
    state = sum(p.nbytes for p in training.params.values())
    peak, allowed = (
        peak_above(step) + state,
        budget(shape, arguments.rows * arguments.tokens, gpu=run.device.type == "cuda"),
    )
    actions = {**forwards(resolved, batch, run.device), "LOZO step": step}
    seconds = best_seconds(actions, arguments.rounds)
    written = "0" if base_digest(run.loaded.model) == before else "NOT 0"
    return [
        f"| {storage}: {name} | {value:.3f} | {value / seconds['two forwards, same loss']:.2f} | | |"
        if name != "LOZO step"
        else f"| {storage}: {name} | {value:.3f} | {value / seconds['two forwards, same loss']:.2f} | "
        f"{peak / GIB:.3f} of {allowed / GIB:.3f} | {written} |"
        for name, value in seconds.items()
    ]


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--storage", nargs="+", default=["bf16", "nf4"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/lozo_step"))
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"Command: `python tests/benchmarks/lozo_step.py {' '.join(sys.argv[1:])}`")
    print(
        f"{device}; {arguments.rows} x {arguments.tokens} tokens on each side; R = {RANK * BLOCKS}; all linear layers.\n"
    )
    print(
        "| what | seconds | ratio | GiB above the weights, of budget | bytes written to the base |\n|---|--:|--:|--:|--:|"
    )
    for storage in arguments.storage:
        print("\n".join(measure(arguments, storage)), flush=True)
    print("\nBy the formula, NF4 with double quantization, 0.5 GiB of context:\n")
    print("| model | weights | 2 x 16 x 512 tokens | 2 x 2048 tokens |\n|---|--:|--:|--:|")
    for name, shape in SIZES.items():
        totals = [(packed(shape) + CONTEXT + budget(shape, tokens, gpu=True)) / 1e9 for tokens in (16 * 512, 2048)]
        print(f"| {name} | {packed(shape) / 1e9:.2f} GB | {totals[0]:.2f} GB | {totals[1]:.2f} GB |")


if __name__ == "__main__":
    main()
