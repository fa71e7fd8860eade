"""Weights per second through the fused rotations, and vectors through the online one, against a copy of the memory.

    python tests/benchmarks/rotate.py [--threads N] [--size llama2-7b]

The last column of the first table says how long all block weights, embedding and head of the model take at that speed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from qaft.arch.base import Arch
from qaft.arch.llama import LLAMA
from qaft.rotation.choice import Choice
from qaft.rotation.fuse import Fusion
from qaft.rotation.hadamard import Hadamard
from qaft.rotation.places import down_rotation

SIZES = {
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "head_dim": 64, "num_heads": 9, "num_kv_heads": 3},
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "head_dim": 128,
        "num_heads": 32,
        "num_kv_heads": 32,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "head_dim": 128,
        "num_heads": 28,
        "num_kv_heads": 4,
    },
}
LAYERS = {"smollm2-135m": (30, 49152), "llama2-7b": (32, 32000), "qwen2.5-7b": (28, 152064)}
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
REPEATS = 3


def seconds(work: Callable[[], object]) -> float:
    """Return the best of a few runs after one that does not count."""
    work()
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best


def shape_of(arch: Arch, part: str) -> tuple[int, int]:
    """Return the shape of a linear of a block."""
    queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    hidden, wide = arch.hidden_size, arch.intermediate_size
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }[part]


def fused(size: str) -> None:
    """Print the speed of fusing R1, R2 and R4 into bf16 weights."""
    arch = Arch(family=LLAMA, num_layers=1, tied=False, **SIZES[size])
    fusion = Fusion(arch, Choice.uniform(1, residual=True, values=True, down=True))
    norms = {name: torch.rand(arch.hidden_size) + 0.5 for name in fusion.norm_names}
    total = 0.0
    for part in (*PARTS, *MLP):
        weight = torch.randn(shape_of(arch, part)).to(torch.bfloat16)
        name = f"model.layers.0.{part}.weight"
        took = seconds(lambda name=name, weight=weight: fusion.forward(name, weight, norms))
        copied = seconds(lambda weight=weight: weight.float())
        total += took
        print(f"{part:18s} {weight.numel() / took / 1e6:7.0f} M/s   {took / copied:5.1f}x the conversion to fp32")
    layers, vocabulary = LAYERS[size]
    table = torch.randn(4096, arch.hidden_size).to(torch.bfloat16)
    rows = seconds(lambda: fusion.forward("model.embed_tokens.weight", table, norms)) / 4096
    print(f"{size}: {total * layers + 2 * vocabulary * rows:.1f} s for the whole model")


def online(size: str) -> None:
    """Print the speed of the online rotation of down's input and of a full Hadamard, in fp32."""
    arch = Arch(family=LLAMA, num_layers=1, tied=False, **SIZES[size])
    x = torch.randn(512, arch.intermediate_size)
    copied = seconds(x.clone)
    for label, rotation in (
        ("R4 in blocks", down_rotation(arch, rotation="hadamard")),
        ("full Hadamard", Hadamard(arch.intermediate_size)),
    ):
        took = seconds(lambda rotation=rotation: rotation(x))
        print(f"{label:18s} {x.numel() / took / 1e6:7.0f} M/s   {took / copied:5.1f}x a copy")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", choices=SIZES, default="llama2-7b")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        fused(arguments.size)
        online(arguments.size)


if __name__ == "__main__":
    main()
