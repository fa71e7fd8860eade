"""Time and memory of the loss over a frozen head, forward and backward, beside full logits and torch's own chunked loss.

    python tests/benchmarks/head_loss.py [--tokens 1020] [--hidden 576] [--vocabulary 49152] [--rounds 5] [--out FILE]

One process per loss, so that each has its own peak of memory. Reported is the best of all rounds, and the two matrix
products (logits, and the gradient of the hidden states) that no implementation can do without.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qaft.train.log import peak_memory_gib
from qaft.train.loss import LOGITS_PER_CHUNK, _FrozenHeadLoss


def products(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The two products alone."""
    return (F.linear(hidden, weight) @ weight).sum()


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits in fp32, as transformers computes its loss."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's chunked loss."""
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum")


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours."""
    return _FrozenHeadLoss.apply(hidden, targets, weight, None, None, LOGITS_PER_CHUNK)  # type: ignore[return-value]


LOSSES = {"the two products": products, "full logits": full_logits, "linear_cross_entropy": linear_cross_entropy}
LOSSES["qaft"] = chunked


def measure(name: str, tokens: int, hidden_size: int, vocabulary: int, rounds: int) -> tuple[float, float, float]:
    """Return seconds, peak GiB above the inputs, and the value."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight = torch.randn(vocabulary, hidden_size, dtype=torch.bfloat16).mul_(0.05).to(device)  # no peak of its own
    hidden = torch.randn(tokens, hidden_size, dtype=torch.bfloat16).to(device)
    hidden.requires_grad_(name != "the two products")
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    before, best, value = peak_memory_gib(device), float("inf"), 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        loss = LOSSES[name](hidden, weight, targets)
        if loss.requires_grad:
            loss.backward()
        value = loss.item()
        best = min(best, time.perf_counter() - start)
    return best, peak_memory_gib(device) - before, value


def main() -> None:
    """Measure every loss in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1020)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    shape = (arguments.tokens, arguments.hidden, arguments.vocabulary, arguments.rounds)
    lines = [
        f"Command: `python tests/benchmarks/head_loss.py {' '.join(sys.argv[1:])}`",
        f"{arguments.tokens} targets, hidden size {arguments.hidden}, vocabulary {arguments.vocabulary}, bf16, "
        f"{torch.get_num_threads()} threads; best of {arguments.rounds}.",
        "",
        "| loss | ms | peak above the inputs, MiB | value |",
        "|---|--:|--:|--:|",
    ]
    context = multiprocessing.get_context("spawn")
    for name in LOSSES:
        with context.Pool(1) as pool:
            seconds, peak, value = pool.apply(measure, (name, *shape))
        shown = "" if name == "the two products" else f"{value:.2f}"
        lines.append(f"| {name} | {seconds * 1e3:.0f} | {peak * 1024:.0f} | {shown} |")
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
