"""``qaft report``: what a run has logged, as one picture and a short table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qaft.errors import RecipeError
from qaft.train.log import METRICS

PICTURE = "report.png"
QUANTITIES = {
    "delta_g": "output error from the weight",
    "delta_w": "weight error",
    "delta_x": "input error",
    "clip_fraction": "clipped weights",
    "flip_rate": "codes that flip per step",
    "changed": "codes unlike the base model's",
}
"""Those of ``qaft.train.diagnostics`` that are shown, and what they are called."""

Series = list[tuple[int, float]]
"""(step, value) in the order of steps."""

_PREFIX = "quantization/"


@dataclass
class History:
    """What ``metrics.jsonl`` of a run holds.

    Attributes:
        losses: training losses.
        eval_losses: those on the validation data.
        quantities: quantity -> layer -> values, for each layer at the steps at which it was measured.
        turned: steps at which the choice of rotations changed.
    """

    losses: Series = field(default_factory=list)
    eval_losses: Series = field(default_factory=list)
    quantities: dict[str, dict[str, Series]] = field(default_factory=dict)
    turned: list[int] = field(default_factory=list)


def report_run(folder: Path, console: Console, *, out: Path | None = None) -> Path:
    """Print the last values of a run, draw its history, and return the picture's path.

    Args:
        folder: of a run; one that is still training will do.
        console: where the table goes.
        out: the picture; default: ``report.png`` in the folder.

    Raises:
        RecipeError: it is no run folder, or nothing has been logged; or matplotlib is not installed.
    """
    history = read_history(folder)
    try:
        # An extra of the package.
        from qaft.commands.report_plot import draw_history
    except ImportError as error:
        raise RecipeError("qaft report draws with matplotlib: pip install qaft[plot]") from error
    console.print(summary_table(history))
    path = draw_history(history, out or folder / PICTURE, title=folder.name)
    console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return path


def read_history(folder: Path) -> History:
    """Return what a run has logged.

    Raises:
        RecipeError: there is no log in the folder, or no loss in the log.
    """
    path = folder / METRICS
    if not path.is_file():
        raise RecipeError(f"{folder}: no {METRICS} in it, so this is no run folder; give train.output of a run")
    history = History()
    for record in _records(path):
        step = int(record["step"])
        for key, series in (("loss", history.losses), ("eval_loss", history.eval_losses)):
            if key in record:
                series.append((step, float(record[key])))
        if record.get("rotations/changed"):
            history.turned.append(step)
        for quantity, layer, value in _of_layers(record):
            history.quantities.setdefault(quantity, {}).setdefault(layer, []).append((step, value))
    if not history.losses and not history.eval_losses:
        raise RecipeError(f"{path}: no loss in it yet; wait for the first logged step (train.log_every)")
    return history


def summary_table(history: History) -> Table:
    """Return the last mean of every quantity, and the layer that is worst in it."""
    table = Table(title=_losses(history), title_justify="left", title_style="")
    table.add_column("quantity", no_wrap=True)
    table.add_column("mean of layers", justify="right")
    table.add_column("highest", justify="right")
    table.add_column("in", overflow="fold")
    for quantity in QUANTITIES:
        latest = latest_values(history, quantity)
        if latest:
            worst = max(latest, key=latest.__getitem__)
            mean = sum(latest.values()) / len(latest)
            table.add_row(quantity, f"{mean:.4g}", f"{latest[worst]:.4g}", worst)
    return table


def latest_values(history: History, quantity: str) -> dict[str, float]:
    """Return layer -> the last value of a quantity."""
    return {layer: series[-1][1] for layer, series in history.quantities.get(quantity, {}).items()}


def place_of(layer: str) -> tuple[str, int]:
    """Return what kind of linear a layer is and how deep: ``model.layers.3.mlp.up_proj`` -> (up_proj, 3)."""
    depth = re.search(r"\.(\d+)\.", layer)
    return layer.rpartition(".")[2], int(depth[1]) if depth else 0


def _losses(history: History) -> str:
    parts = []
    for name, series in (("loss", history.losses), ("eval loss", history.eval_losses)):
        if series:
            (first, begin), (last, end) = series[0], series[-1]
            parts.append(f"{name} {begin:.4f} at step {first}, {end:.4f} at step {last}")
    return "; ".join(parts)


def _records(path: Path) -> Iterator[Mapping[str, float]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            # The last line of a run that is writing, or was killed.
            continue
        if isinstance(record, dict) and "step" in record:
            yield record


def _of_layers(record: Mapping[str, float]) -> Iterator[tuple[str, str, float]]:
    for key, value in record.items():
        quantity, _, layer = key.removeprefix(_PREFIX).partition("/")
        if key.startswith(_PREFIX) and layer and value is not None and math.isfinite(value):
            yield quantity, layer, float(value)
