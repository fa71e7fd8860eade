"""The cells of ``updates_compared.py`` as Markdown tables, one for each model and task."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from compared_variants import BUDGETS
from spread import spread

Cell = Mapping[str, Any]
Place = tuple[str, str]

CLAIMS: tuple[tuple[str, Place, Place], ...] = (
    ("LinChain: above LoRA of its rank", ("linchain", "rank 8"), ("lowrank (LoRA)", "rank 8")),
    (
        "RoCoFT: rows at least LoRA, with a quarter of its scalars",
        ("roco, rows", "default"),
        ("lowrank (LoRA)", "rank 8"),
    ),
    ("RoCoFT: columns at least LoRA, likewise", ("roco, columns", "default"), ("lowrank (LoRA)", "rank 8")),
    ("SSB: above SSL", ("ssb", "default"), ("ssl", "default")),
    ("SSB: above IA3", ("ssb", "default"), ("ia3", "default")),
    ("SSB: below LoRA", ("lowrank (LoRA)", "small"), ("ssb", "small")),
    ("SIFT: as LoRA with as many scalars", ("sift, entries", "rank 8"), ("lowrank (LoRA)", "rank 8")),
    ("GSOFT: above LoRA with as many scalars", ("gsoft", "rank 8"), ("lowrank (LoRA)", "rank 8")),
)
"""What the papers find, as (claim, the better update and its budget, the worse): arXiv 2411.00039, 2410.10075, the SSL and
SSB paper, 2312.11875, 2406.10019."""


def table(rows: Sequence[Cell]) -> str:
    """Return for each model and task what was measured, mean and standard deviation over seeds, and the papers' claims."""
    trained = [row for row in rows if row.get("kind") is not None]
    pairs = dict.fromkeys((row["model"], row["task"]) for row in trained)
    return "\n\n".join([summary(trained), *(_of_task(rows, trained, model, task) for model, task in pairs)])


def summary(trained: Iterable[Cell]) -> str:
    """Return the scores alone: a row for each update, a column for each model, task and budget."""
    found: dict[str, dict[tuple[str, str, str], list[float]]] = {}
    for row in trained:
        for budget in row["budgets"]:
            place = (row["model"], row["task"], budget)
            found.setdefault(row["name"], {}).setdefault(place, []).append(row["score"])
    places = sorted(
        {place for cells in found.values() for place in cells}, key=lambda p: (p[0], p[1], BUDGETS.index(p[2]))
    )
    lines = [f"| update | {' | '.join(' '.join(p) for p in places)} |", f"|---|{'--:|' * len(places)}"]
    for name, cells in found.items():
        values = [spread(cells[p], _digits(p[1])) if p in cells else "" for p in places]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def _digits(task: str) -> int:
    """Return the decimals of a score: an accuracy in percent, or the loss that is taken for gsm8k."""
    return 3 if task == "gsm8k" else 1


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
            lines.append(_line(budget, group, digits=_digits(task)))
    return "\n".join([*lines, *_claims(here, digits=_digits(task), sign=-1 if is_loss else 1)])


def _claims(here: Sequence[Cell], *, digits: int, sign: int) -> Iterator[str]:
    """Compare what papers compare, seed by seed: how much better the better one is, and in how many seeds."""

    def scores(place: Place) -> dict[int, float]:
        name, budget = place
        return {row["seed"]: row["score"] for row in here if row["name"] == name and budget in row["budgets"]}

    yield ""
    yield "| claim | better by | seeds in favour |"
    yield "|---|--:|--:|"
    for claim, better, worse in CLAIMS:
        first, second = scores(better), scores(worse)
        gains = [sign * (first[seed] - second[seed]) for seed in sorted(first.keys() & second.keys())]
        if gains:
            yield f"| {claim} | {spread(gains, digits)} | {sum(gain > 0 for gain in gains)} of {len(gains)} |"


def _same(cells: Iterable[Cell], row: Cell) -> list[Cell]:
    return [cell for cell in cells if (cell["kind"], cell["options"]) == (row["kind"], row["options"])]


def _mean_score(group: Sequence[Cell]) -> float:
    return statistics.mean(cell["score"] for cell in group)


def _line(budget: str, group: Sequence[Cell], *, digits: int) -> str:
    first, scores = group[0], [cell["score"] for cell in group]
    options = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in first["options"].items())
    speed = statistics.median(cell["tokens_per_second"] for cell in group)
    return (
        f"| {budget} | {first['name']} | {options} | {spread(scores, digits)} | {len(scores)} | "
        f"{first['trainables']:,} | {first['kept_bytes_per_token'] / 1024:.0f} | {speed:.0f} | {first['lr']:g} | "
        f"{first['exports']} |"
    )
