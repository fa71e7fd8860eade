"""The main job in a few milliseconds: a recipe on a tiny checkpoint and eight rows that can be memorised."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from qaft.build import Run
from qaft.commands.train import train_and_export
from qaft.recipe import parse_recipe

COLORS = ("red", "green", "blue", "white", "black", "pink", "gold", "grey")
ROWS = [{"prompt": f"Box {i} is", "completion": f" {color}"} for i, color in enumerate(COLORS)]
DIALOGUES = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in ROWS
]


def write_rows(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS), encoding="utf-8")
    return path


def job(checkpoint: Path, folder: Path, **sections: Mapping[str, Any] | list[Any] | None) -> dict[str, Any]:
    """A recipe whose sections are the defaults below, changed by the given keys."""
    data = folder / "rows.jsonl"
    if not data.exists():
        write_rows(data)
    raw: dict[str, Any] = {
        "model": {"name": str(checkpoint), "storage": "fp32", "dtype": "float32"},
        "update": {"kind": "dense"},
        "optim": {"lr": 3e-3, "schedule": "constant", "warmup": 0},
        "data": {
            "train": str(data),
            "valid": str(data),
            "chat_template": "plain",
            "max_length": 64,
            # All rows in every step: its loss is that of the whole set.
            "packing": False,
        },
        "train": {"steps": 8, "batch_size": len(ROWS), "output": str(folder / "run")},
    }
    for name, given in sections.items():
        raw[name] = {**raw.get(name, {}), **given} if isinstance(given, Mapping) else given
    return raw


def write_job(path: Path, raw: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(raw)), encoding="utf-8")
    return path


def train(raw: Mapping[str, Any]) -> Run:
    return train_and_export(parse_recipe(dict(raw)), quiet())


def quiet() -> Console:
    return Console(file=io.StringIO())


def losses(folder: Path) -> list[float]:
    """The training loss of every logged step, each measured before the step."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]
