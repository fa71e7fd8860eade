"""The cells of ``updates_compared.py`` as Markdown tables, one for each model and task."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compared_variants import BUDGETS

Cell = Mapping[str, Any]


def table(rows: Sequence[Cell]) -> str:
    """Return one table for each model and task: mean and standard deviation over seeds."""
    trained = [row for row in rows if row.get("kind") is not None]
    pairs = dict.fromkeys((row["model"], row["task"]) for row in trained)
    return "\n\n".join(_of_task(rows, trained, model, task) for model, task in pairs)


def _of_task(rows: Sequence[Cell], trained: Sequence[Cell], model: str, task: str) -> str:
    here = [row for row in trained if (row["model"], row["task"]) == (model, task)]
    is_loss = task == "gsm8k"
    start = next(
        (r["score"] for r in rows if r.get("kind", 0) is None and (r["model"], r["task"]) == (model, task)), None
    )
    head = f"**{task}, {model}** ({here[0]['steps']} steps" + ("" if start is None else f"; untrained {start:.4g}")
    unit = "loss" if is_loss else "accuracy, %"
    lines = [
        f"{head})",
        "",
        f"| budget | update | options | {unit} | seeds | trainables | kept, KiB/token | tokens/s | lr | exports |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for budget in BUDGETS:
        cells = [row for row in here if budget in row["budgets"]]
        groups = [_same(cells, row) for row in cells if row is _same(cells, row)[0]]
        for group in sorted(groups, key=_mean_score, reverse=not is_loss):
            lines.append(_line(budget, group, digits=3 if is_loss else 1))
    return "\n".join(lines)


def _same(cells: Iterable[Cell], row: Cell) -> list[Cell]:
    return [cell for cell in cells if (cell["kind"], cell["options"]) == (row["kind"], row["options"])]


def _mean_score(group: Sequence[Cell]) -> float:
    return statistics.mean(cell["score"] for cell in group)


def _line(budget: str, group: Sequence[Cell], *, digits: int) -> str:
    first, scores = group[0], [cell["score"] for cell in group]
    spread = f" ± {statistics.stdev(scores):.{digits}f}" if len(scores) > 1 else ""
    options = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in first["options"].items())
    speed = statistics.median(cell["tokens_per_second"] for cell in group)
    return (
        f"| {budget} | {first['name']} | {options} | {statistics.mean(scores):.{digits}f}{spread} | {len(scores)} | "
        f"{first['trainables']:,} | {first['kept_bytes_per_token'] / 1024:.0f} | {speed:.0f} | {first['lr']:g} | "
        f"{first['exports']} |"
    )
