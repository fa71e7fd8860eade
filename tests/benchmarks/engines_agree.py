"""How far every engine with two ranks is from one process on the whole batch: every update, over every base.

    python tests/benchmarks/engines_agree.py [--updates KIND ...] [--out FILE]

Prints a Markdown table: the largest difference of a loss, and of a parameter, after four steps of two micro-batches
with gradient clipping, weight decay, a schedule and two learning rates, in fp32 on CPUs.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "train")]

import torch  # noqa: E402
from engine_ranks import BASES, ENGINES, KINDS, STEPS, Case, difference, outcome, train  # noqa: E402
from tiny_checkpoint import write_checkpoint  # noqa: E402
from two_ranks import run_ranks  # noqa: E402


def measure(folder: Path, kinds: list[str]) -> dict[Case, list[tuple[float, float]]]:
    """Return the differences of loss and parameters for every update and base, by engine."""
    checkpoint = write_checkpoint(folder / "model", dtype=torch.float32)
    cases = [Case(kind, base) for kind in kinds for base in BASES]
    for case in cases:
        train(case, checkpoint, folder)
    run_ranks(TESTS / "train" / "train_in_ranks.py", str(folder), str(checkpoint), *kinds)
    return {
        case: [difference(outcome(case, folder), outcome(replace(case, engine=engine), folder)) for engine in ENGINES]
        for case in cases
    }


def table(measured: dict[Case, list[tuple[float, float]]]) -> str:
    """Return a row for each update and base; a cell holds the differences of loss and of parameters."""
    lines = [
        f"Two ranks against one process, {STEPS} steps: largest difference of a loss / of a parameter.",
        "",
        f"| update | base | {' | '.join(ENGINES)} |",
        f"|---|---|{'---|' * len(ENGINES)}",
    ]
    for case, cells in measured.items():
        lines.append(f"| {case.kind} | {case.base} | {' | '.join(f'{a:.0e} / {b:.0e}' for a, b in cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", nargs="+", choices=sorted(KINDS), default=sorted(KINDS), help="default: all")
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        text = table(measure(Path(folder), arguments.updates))
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
