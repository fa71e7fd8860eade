"""The table of the comparison of updates."""

from __future__ import annotations

from typing import Any

import pytest
from compared_table import table


def cell(name: str, seed: int, score: float, *budgets: str, task: str = "mr") -> dict[str, Any]:
    return {
        "model": "encoder",
        "task": task,
        "kind": name,
        "name": name,
        "options": {"rank": 8},
        "seed": seed,
        "budgets": list(budgets),
        "score": score,
        "steps": 10,
        "trainables": 1000,
        "kept_bytes_per_token": 2048.0,
        "tokens_per_second": 5.0,
        "lr": 0.1,
        "exports": "merged",
    }


CELLS = [
    {"model": "encoder", "task": "mr", "kind": None, "score": 50.0},
    cell("lowrank (LoRA)", 0, 70.0, "default", "rank 8"),
    cell("lowrank (LoRA)", 1, 72.0, "default", "rank 8"),
    cell("linchain", 0, 71.0, "rank 8"),
    cell("linchain", 1, 71.0, "rank 8"),
]


def test_a_row_has_mean_spread_seeds_and_costs_and_the_best_is_first() -> None:
    lines = table([*CELLS, cell("linchain", 2, 80.0, "rank 8")]).splitlines()
    assert lines[:4] == [
        "| update | encoder mr default | encoder mr rank 8 |",
        "|---|--:|--:|",
        "| lowrank (LoRA) | 71.0 ± 1.4 | 71.0 ± 1.4 |",
        "| linchain |  | 74.0 ± 5.2 |",
    ]
    assert lines[5] == "**mr, encoder** (10 steps; untrained 50)"
    ranked = [line.split(" | ")[1] for line in lines if line.startswith("| rank 8 ")]
    assert ranked == ["linchain", "lowrank (LoRA)"]
    lora = "| lowrank (LoRA) | rank 8 | 71.0 ± 1.4 | 2 | 1,000 | 2 | 5 | 0.1 | merged |"
    assert [line for line in lines if lora in line] == [f"| default {lora}", f"| rank 8 {lora}"]


@pytest.mark.parametrize(("task", "expected"), [("mr", "0.0 ± 1.4 | 1 of 2"), ("gsm8k", "0.000 ± 1.414 | 1 of 2")])
def test_claims_compare_the_seeds_that_both_have_and_a_loss_is_better_when_smaller(task: str, expected: str) -> None:
    cells = [{**row, "task": task} for row in [*CELLS, cell("linchain", 2, 80.0, "rank 8")]]
    assert f"| LinChain: above LoRA of its rank | {expected} |" in table(cells)
    shifted = [{**row, "score": row["score"] + (row.get("name") == "linchain")} for row in cells]
    sign = "-" if task == "gsm8k" else ""
    assert f"LoRA of its rank | {sign}1." in table(shifted)
