"""What each update costs beside LoRA of rank 8: processor time of a layer's forward and backward pass, and of a step.

    python tests/benchmarks/update_cost.py [--model FOLDER] [--kinds gsoft ssb] [--threads 1] [--rounds 5]

Layers are square, on a frozen base in the given dtype; every update has been moved off its start. Times are the least of
``--rounds`` rounds over all updates in turn, so that what else the machine does meets them all. ``kept`` is what autograd
keeps per token besides parameters, in bytes over those of the layer's input. With ``--model``, also whole training steps
(forward, backward, no optimizer) of a causal LM with updates on ``--targets``, by default all linear layers of its blocks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from compared_decoder import kept_bytes
from torch import Tensor

from qaft.bases import DenseBase, LinearSpec
from qaft.layers.adapted import AdaptedLinear
from qaft.recipe import parse_recipe
from qaft.registry import build_from
from qaft.updates import UPDATES

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lowrank, rank 8": ("lowrank", {"rank": 8}),
    "linchain, rank 8": ("linchain", {"rank": 8}),
    "roco, 4 rows": ("roco", {"rows": 4}),
    "roco, 4 columns": ("roco", {"columns": 4}),
    "ssl": ("ssl", {}),
    "ssb": ("ssb", {}),
    "ia3": ("ia3", {}),
    "sift, 1 % of entries": ("sift", {"rate": 0.01, "choose": "random"}),
    "sift, 1 % in 64-blocks": ("sift", {"rate": 0.01, "choose": "random", "entries": "block64"}),
    "gsoft, blocks of 32": ("gsoft", {"block": 32}),
    "dense": ("dense", {}),
}
SHAPES = ((1024, 512), (4096, 256))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODEL_ROWS = 4

Step = Callable[[], None]


def layer(kind: str, options: Mapping[str, Any], size: int, dtype: torch.dtype) -> AdaptedLinear:
    """Return an adapted square layer whose update has moved."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator).to(dtype) / size**0.5
    spec = LinearSpec(name="layer", out_features=size, in_features=size)
    update = build_from(UPDATES, kind, options, spec, where="update")
    for parameter in update.parameters():
        parameter.data.add_(1e-2 * torch.randn(parameter.shape, generator=generator))
    return AdaptedLinear(DenseBase(weight), update)


def layer_step(module: AdaptedLinear, x: Tensor) -> Step:
    """Return one forward and backward pass."""
    gradient = torch.ones(len(x), module.out_features, dtype=x.dtype)
    wanted = [x, *module.update.parameters()]
    return lambda: (torch.autograd.grad(module(x), wanted, gradient), None)[1]


def best_times(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Return the least processor time of each step in milliseconds."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            best[name] = min(best[name], 1e3 * (time.process_time() - begin))
    return best


def layers_table(size: int, tokens: int, dtype: str, rounds: int) -> None:
    """Print the table of one shape."""
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype]).requires_grad_()
    modules = {name: layer(kind, options, size, DTYPES[dtype]) for name, (kind, options) in CASES.items()}
    times = best_times({name: layer_step(module, x) for name, module in modules.items()}, rounds)
    print(f"\n{size} x {size}, {tokens} tokens, {dtype}\n\n| update | ms | ratio | kept |\n|---|--:|--:|--:|")
    for name, found in times.items():
        kept = kept_bytes(modules[name], lambda name=name: modules[name](x)) / x.nbytes
        print(f"| {name} | {found:.2f} | {found / times['lowrank, rank 8']:.2f} | {kept:.2f} |", flush=True)


def model_step(folder: str, kind: str, options: Mapping[str, Any], *, targets: Sequence[str], length: int) -> Step:
    """Return a step of a causal LM on random tokens, ``length`` in a row."""
    from qaft.build import build_run
    from qaft.train.loss import CausalLoss

    recipe = parse_recipe(
        {
            "model": {"name": folder},
            "select": {"targets": list(targets)},
            "update": {"kind": kind, **options},
            "train": {"output": tempfile.mkdtemp()},
        }
    )
    loaded = build_run(recipe).loaded
    loss = CausalLoss(loaded.model)
    ids = torch.randint(loaded.source.config.vocab_size, (MODEL_ROWS, length))

    def step() -> None:
        loss(ids, ids).backward()
        loaded.model.zero_grad(set_to_none=True)

    return step


def model_table(folder: str, rounds: int, kinds: Sequence[str], **scope: Any) -> None:
    """Print the table of a model; one update in memory at a time, with LoRA before and after each."""
    cases = {name: case for name, case in CASES.items() if case[0] != "lowrank" and case[0] in kinds}
    lora = model_step(folder, *CASES["lowrank, rank 8"], **scope)
    print(
        f"\nmodel step, {MODEL_ROWS} x {scope['length']} tokens, bf16, {' and '.join(scope['targets'])} linear layers"
    )
    print("\n| update | ms | ratio |\n|---|--:|--:|")
    for name, (kind, options) in cases.items():
        times = best_times({"lora": lora, "update": model_step(folder, kind, options, **scope)}, rounds)
        print(f"| {name} | {times['update']:.0f} | {times['update'] / times['lora']:.2f} |", flush=True)


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="causal LM; default: layers only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=list(UPDATES), help="of updates in the table of the model")
    parser.add_argument("--targets", nargs="+", default=["all"], help="linear layers of the model")
    parser.add_argument("--length", type=int, default=64, help="tokens in a row of the model's batch")
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES), help="of layers; none: no layers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"Command: `python tests/benchmarks/update_cost.py {' '.join(sys.argv[1:])}`")
    print(f"CPU, {arguments.threads} threads; processor time of forward and backward, best of {arguments.rounds}.")
    for size, tokens in SHAPES:
        for dtype in arguments.dtypes:
            layers_table(size, tokens, dtype, arguments.rounds)
    if arguments.model:
        scope = {"targets": arguments.targets, "length": arguments.length}
        model_table(arguments.model, max(1, arguments.rounds // 2), arguments.kinds, **scope)


if __name__ == "__main__":
    main()
