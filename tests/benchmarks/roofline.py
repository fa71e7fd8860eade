"""Fake quantization and the online Hadamard transform beside a memory copy of the same bytes: the roofline of each.

    python tests/benchmarks/roofline.py [--threads 1] [--tokens 2048] [--rounds 15] [--out FILE]

A kernel that reads its input once and writes its output once can at best be as fast as a copy. Two of them, because
allocating is part of the work: ``clone`` writes new memory, as the measured functions do; ``copy_`` writes memory that
is mapped already. Both have as many bytes as the function (fp32 to fp32, or bf16 to bf16; with a backward pass, twice
that). Functions and copies take turns, and the best of all rounds counts. "codes" compares with the reference in torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qaft.quant import Affine, TokenQuantizer
from qaft.rotation.blocks import BlockDiagonal
from qaft.rotation.hadamard import Hadamard
from qaft.rotation.sylvester import reference

WIDTHS = (4096, 8192, 11008, 14336)
WEIGHT = (4096, 4096)


@dataclass(frozen=True)
class Case:
    """One row: what is timed, the tensor whose copy is the bound, how often it moves, and whether it is the reference."""

    label: str
    run: Callable[[], object]
    moved: Tensor
    passes: int
    exact: bool


def with_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()
    grad = torch.ones_like(function(leaf.detach()))

    def run() -> None:
        leaf.grad = None
        function(leaf).backward(grad)

    return run


def weight_cases(device: torch.device) -> Iterator[Case]:
    weight = torch.randn(WEIGHT, device=device)
    grids = {
        "int4 g128": {},
        "int4 g32": {"group_size": 32},
        "int4 per channel": {"group_size": None},
        "int4 g128 asymmetric": {"symmetric": False},
        "int4 g128 clip 0.95, mask": {"clip": 0.95},
    }
    for label, options in grids.items():
        grid = Affine(**options, fused=device.type == "cpu")
        expected = grid.quantize(weight).dequantize(torch.float32)
        exact = torch.equal(grid(weight), expected)
        yield Case(f"weights {label}, forward", lambda grid=grid: grid(weight), weight, 1, exact)
        yield Case(f"weights {label}, and backward", with_backward(grid, weight), weight, 2, exact)


def activation_cases(device: torch.device, tokens: int) -> Iterator[Case]:
    for width in WIDTHS:
        x = torch.randn(tokens, width, device=device).bfloat16()
        block = width & -width  # the largest power of two that divides it
        rotation = BlockDiagonal(width, Hadamard(block)).to(device)
        expected = reference(x.unflatten(-1, (-1, block)), scale=block**-0.5).view(x.shape)
        exact = torch.equal(rotation(x), expected)
        name = f"{width // block} x {block}"
        yield Case(f"Hadamard {name}, forward", lambda x=x, r=rotation: r(x), x, 1, exact)
        yield Case(f"Hadamard {name}, and backward", with_backward(rotation, x), x, 2, exact)
        for quantizer in (TokenQuantizer(bits=8), TokenQuantizer(bits=4, symmetric=False, clip=0.95)):
            exact = torch.equal(quantizer(x), quantizer._in_torch(x, x.shape, masked=False)[0])
            kind = "int8" if quantizer.symmetric else "int4 asymmetric"
            yield Case(f"tokens {width}, {kind}", lambda x=x, q=quantizer: q(x), x, 1, exact)


def best_seconds(actions: list[Callable[[], object]], rounds: int, wait: Callable[[], None]) -> list[float]:
    best = [float("inf")] * len(actions)
    for action in actions:
        action()
    for _ in range(rounds):
        for index, action in enumerate(actions):
            wait()
            start = time.perf_counter()
            action()
            wait()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def row(case: Case, rounds: int, wait: Callable[[], None]) -> str:
    target = torch.empty_like(case.moved)
    copies: list[Callable[[], object]] = [case.moved.clone, lambda: target.copy_(case.moved)]
    taken, clone, copy = best_seconds([case.run, *copies], rounds, wait)
    bytes_moved = 2 * case.moved.nbytes * case.passes
    against = f"{taken / clone / case.passes:.2f} | {taken / copy / case.passes:.2f}"
    codes = "equal" if case.exact else "DIFFERENT"
    return f"| {case.label} | {taken * 1e6:.0f} | {bytes_moved / taken / 1e9:.1f} | {against} | {codes} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {arguments.threads} threads"
    lines = [
        f"Command: `python tests/benchmarks/roofline.py {' '.join(sys.argv[1:])}`",
        f"{where}; weights {list(WEIGHT)} fp32, {arguments.tokens} tokens bf16; best of {arguments.rounds}.",
        "",
        "| kernel | us | GB/s | time / clone | time / copy_ | codes |",
        "|---|--:|--:|--:|--:|---|",
    ]
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for cases in (weight_cases(device), activation_cases(device, arguments.tokens)):
        lines += [row(case, arguments.rounds, wait) for case in cases]
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
