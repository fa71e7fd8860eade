"""The file of cells and the table of the RoSTE comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from roste_plan import Cell, finished, plan, read
from roste_table import summary, table
from spread import spread

CONFIG = {
    "model": "m",
    "batch": 2,
    "steps": 3,
    "documents": 4,
    "ppl_tokens": 5,
    "group_size": None,
    "lr": {"full": [1, 2]},
}
ERRORS = {"q_proj": {"I": dict.fromkeys(("delta_w", "delta_x", "delta_g", "delta_y"), 0.5)}}
ERRORS["q_proj"]["H"] = dict.fromkeys(("delta_w", "delta_x", "delta_g", "delta_y"), 0.25)


def line(method: str, seed: int, ppl: float, **more: Any) -> dict[str, Any]:
    cell = {"setting": "W4A4KV4", "scope": "full", "method": method, "seed": seed, "config": CONFIG, "commit": "abc"}
    scores = {"ppl": ppl, "summary_loss": ppl / 10, "rouge1": 1.0, "rouge2": 1.0, "rougeL": 100 - ppl}
    return cell | scores | more


LINES = [
    line("rtn", 0, 90.0),
    line("ste", 0, 50.0),
    line("ste", 1, 54.0),
    line("hadamard", 0, 20.0),
    line(
        "adaptive", 0, 30.0, errors=ERRORS, rotated={"residual": True, "values": [0], "attention": [], "down": [1, 2]}
    ),
    line("adaptive", 1, 55.0, errors=ERRORS, rotated={"residual": False, "values": [], "attention": [], "down": []}),
]


def test_every_cell_is_planned_once_and_fine_tunes_before_what_rounds_them() -> None:
    cells = list(plan([0, 1]))
    assert len(cells) == len(set(cells)) == 1 + 2 * (2 + 6 * 5)
    for i, cell in enumerate(cells):
        if cell.method in ("rtn", "gptq"):
            assert Cell(setting="16-bit", scope=cell.scope, method="sft", seed=cell.seed) in cells[:i]


def test_finished_cells_are_known_and_another_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    assert read(path) == [] and finished(path, CONFIG) == set()
    path.write_text("".join(json.dumps(cell) + "\n" for cell in LINES[:2]), encoding="utf-8")
    assert finished(path, CONFIG) == {
        Cell(setting="W4A4KV4", scope="full", method=method, seed=0) for method in ("rtn", "ste")
    }
    with pytest.raises(SystemExit, match="cells of another configuration"):
        finished(path, CONFIG | {"steps": 4})


def test_a_row_has_mean_spread_and_number_of_seeds() -> None:
    text = table(LINES)
    assert "| W4A4KV4 | full | RTN of that SFT | 90.00 | 9.00 | 1.00 | 1.00 | 10.00 | 1 |" in text
    assert "| W4A4KV4 | full | STE, no rotation | 52.00 ± 2.83 | 5.20 ± 0.28 |" in text
    assert spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"


def test_the_summary_has_a_row_for_each_method_and_a_column_for_each_setting() -> None:
    rows = summary(LINES).splitlines()
    assert rows[0] == "| trained | method | W4A16 | W4A8KV4 | W4A4KV4 |"
    assert "| full | STE, no rotation |  |  | 5.20 ± 0.28 / 48.0 ± 2.8 |" in rows
    assert "| qv | RTN of that SFT |  |  |  |" in rows
    assert len(rows) == 2 + 2 * 5


def test_the_order_of_the_paper_is_compared_seed_by_seed() -> None:
    rows = [row for row in table(LINES).splitlines() if " above " in row]
    assert rows[3] == rows[0].replace("W4A4KV4 | full", "all | all")
    assert rows[:3] == [
        "| W4A4KV4 | full | STE, no rotation above RTN of that SFT | yes (1 of 1) | yes (1 of 1) | yes (1 of 1) |",
        "| W4A4KV4 | full | STE, adaptive (RoSTE) above STE, no rotation | mixed (1 of 2) | mixed (1 of 2) | mixed (1 of 2) |",
        "| W4A4KV4 | full | STE, adaptive (RoSTE) above STE, every rotation | no (0 of 1) | no (0 of 1) | no (0 of 1) |",
    ]


def test_errors_and_choice_are_those_of_the_first_adaptive_cell() -> None:
    text = table(LINES)
    assert "| W4A4KV4 | full | q_proj | 0.5000 -> 0.2500 |" in text
    assert "W4A4KV4 full: R1 on, R2 in 1 layers, R3 in 0 layers, R4 in 2 layers." in text


def test_without_cells_there_is_no_table() -> None:
    assert table([]) == summary([]) == ""
