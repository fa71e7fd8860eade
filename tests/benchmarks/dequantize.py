"""Time of the packed base and of the weight grids beside a copy of their result, in one run.

    python tests/benchmarks/dequantize.py [--threads 1 2] [--shapes 576x576 4096x4096]

Each row is the best of several repetitions. ``clone`` allocates its result as the measured functions do; ``copy_`` writes
into memory that is already mapped. The ratios are against ``clone`` and ``copy_`` of the same result.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qaft.bases.affine import AffineBase
from qaft.quant import FP4, MXFP4, NF4, NVFP4, Q4_0, Affine, TokenQuantizer

FLOOR_BYTES_4BIT = 0.5 + 2.0
"""Bytes per weight that ``dequantize`` must move for 4 bits and bf16: packed codes read, result written."""


def best_seconds(
    functions: dict[str, Callable[[], object]], repetitions: int, budget: float = 0.02
) -> dict[str, float]:
    """Return the shortest mean time of one call of each function, in seconds.

    The functions take turns, ``repetitions`` times about ``budget`` seconds each, so that all see the same disturbances.
    """
    calls, best = {}, dict.fromkeys(functions, float("inf"))
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        calls[name] = max(1, int(budget / max(time.perf_counter() - start, 1e-7)))
    for _ in range(repetitions):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            best[name] = min(best[name], (time.perf_counter() - start) / calls[name])
    return best


def dequantizers(weight: Tensor, group_size: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the measured variants of ``AffineBase.dequantize`` and the plain reference, results in bf16."""
    for label, bits, symmetric, scale_dtype in (
        ("int4 bf16 scale", 4, True, torch.bfloat16),
        ("int4 fp32 scale", 4, True, torch.float32),
        ("int4 asymmetric", 4, False, torch.bfloat16),
        ("int8 bf16 scale", 8, True, torch.bfloat16),
        ("int3 bf16 scale", 3, True, torch.bfloat16),
    ):
        grid = Affine(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
        base = AffineBase.from_weight(weight, None, grid, dtype=torch.bfloat16)
        yield f"dequantize {label}", base.dequantize
        if label == "int4 bf16 scale":
            yield "dequantize through QTensor", lambda base=base: base.qtensor().dequantize(torch.bfloat16)


def fake_quantizers(weight: Tensor, group_size: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the measured forward passes of the grids on fp32 latents, results in fp32."""
    grids = {
        "int4": Affine(group_size=group_size),
        "int4 fused": Affine(group_size=group_size, fused=True),
        "int4 asymmetric": Affine(group_size=group_size, symmetric=False),
        "int4 asymmetric fused": Affine(group_size=group_size, symmetric=False, fused=True),
        "int4 signed_absmax": Affine(group_size=group_size, range="signed_absmax"),
        "int4 rms": Affine(group_size=group_size, range="rms"),
        "int4 mse": Affine(group_size=group_size, range="mse"),
        "fp4": FP4(),
        "nf4": NF4(),
        "q4_0": Q4_0(),
        "mxfp4": MXFP4(),
        "nvfp4": NVFP4(),
    }
    for label, grid in grids.items():
        yield f"fake-quantize {label}", lambda grid=grid: grid(weight)
    tokens = TokenQuantizer(bits=8)
    yield "fake-quantize int8 per token", lambda: tokens(weight)
    int4 = grids["int4"]
    yield "fake-quantize through QTensor", lambda: int4.quantize(weight).dequantize(torch.float32)


def measure(out_features: int, in_features: int, repetitions: int) -> None:
    """Print the table of one shape with the current number of threads."""
    weight = torch.randn(out_features, in_features)
    group_size = 128 if in_features % 128 == 0 else 64
    for dtype, variants in ((torch.bfloat16, dequantizers), (torch.float32, fake_quantizers)):
        result = weight.to(dtype)
        target = torch.empty_like(result)
        functions: dict[str, Callable[[], object]] = {
            "clone": result.clone,
            "copy_": lambda target=target, result=result: target.copy_(result),
            **dict(variants(weight, group_size)),
        }
        seconds = best_seconds(functions, repetitions)
        for label, value in seconds.items():
            ratios = f"{value / seconds['clone']:8.2f} x clone {value / seconds['copy_']:8.2f} x copy_"
            print(f"  {label:32s} {value * 1e6:9.0f} us {ratios}")


def main() -> None:
    """Print one table per number of threads and shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=["576x576", "1536x576", "4096x4096"])
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}; floor {FLOOR_BYTES_4BIT} B per weight"
    )
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape in arguments.shapes:
            out_features, in_features = (int(size) for size in shape.split("x"))
            print(f"[{out_features}, {in_features}], threads {threads}")
            measure(out_features, in_features, arguments.repetitions)


if __name__ == "__main__":
    main()
