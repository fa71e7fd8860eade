"""Which cells the RoSTE comparison has, in which order, and the file that keeps them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIXTEEN = "16-bit"
ROTATIONS = {"ste": "none", "hadamard": "hadamard", "adaptive": "adaptive"}
SETTINGS: dict[str, tuple[int | None, bool]] = {"W4A16": (None, False), "W4A8KV4": (8, True), "W4A4KV4": (4, True)}
"""Name -> bits of activations, whether the KV cache is quantized."""

METHODS = ("rtn", "gptq", *ROTATIONS)
ORDER = (
    ("W4A4KV4", "full"),
    ("W4A16", "qv"),
    ("W4A4KV4", "qv"),
    ("W4A8KV4", "full"),
    ("W4A8KV4", "qv"),
    ("W4A16", "full"),
)
"""Which (setting, scope) comes first: the longer a run is given, the more of the table it fills."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one line of the results is about."""

    setting: str
    scope: str
    method: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all cells of one file share; ``lr`` is (16-bit, through the grid) for each scope."""

    model: str
    steps: int
    batch: int
    documents: int
    ppl_tokens: int
    group_size: int | None
    calibration_tokens: int
    lr: Mapping[str, tuple[float, float]]


def plan(seeds: Sequence[int]) -> Iterator[Cell]:
    """Yield the cells in the order in which they are computed."""
    yield Cell(setting=SIXTEEN, scope="-", method="base", seed=seeds[0])
    for seed in seeds:
        tuned: set[str] = set()
        for setting, scope in ORDER:
            if scope not in tuned:
                yield Cell(setting=SIXTEEN, scope=scope, method="sft", seed=seed)
                tuned.add(scope)
            for method in METHODS:
                yield Cell(setting=setting, scope=scope, method=method, seed=seed)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def finished(path: Path, config: dict[str, Any]) -> set[Cell]:
    """Return the cells that a results file holds.

    Raises:
        SystemExit: they were computed with another configuration.
    """
    done = set()
    for line in read(path):
        if line["config"] != config:
            sys.exit(f"{path} holds cells of another configuration, {line['config']}; give another --cells")
        done.add(Cell(**{key: line[key] for key in ("setting", "scope", "method", "seed")}))
    return done
