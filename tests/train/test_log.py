from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qaft.train.console import BarConsole, PlainConsole, make_console
from qaft.train.log import RunLog, peak_memory_gib

CPU = torch.device("cpu")


class Clock:
    """Seconds that only a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_log(folder: Path, clock: Clock, **options: Any) -> RunLog:
    return RunLog(folder, total_steps=10, device=CPU, clock=clock, **options)


def test_training_line_has_the_names_and_values_promised(tmp_path: Path, clock: Clock) -> None:
    log = make_log(tmp_path, clock)
    log.start(0, 0)
    clock.now += 4.0
    log.step(2, [3.0, 2.0], {"base": 1e-3, "v_proj": 4e-3}, 0.123456789, 200)
    (line,) = lines(tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line.pop("time"))
    assert line.pop("peak_memory_gib") == pytest.approx(peak_memory_gib(CPU), rel=0.2)
    assert line == {
        "step": 2,
        "loss": 2.5,
        "learning_rate": 1e-3,
        "learning_rate/v_proj": 4e-3,
        "grad_norm": 0.1234568,
        "tokens": 200,
        "tokens_per_second": 50.0,
    }


def test_first_group_takes_the_plain_name_when_there_is_no_base_group(tmp_path: Path, clock: Clock) -> None:
    log = make_log(tmp_path, clock)
    log.start(0, 0)
    log.step(1, [1.0], {"q_proj": 1.0, "v_proj": 2.0}, 1.0, 1)
    assert {k: v for k, v in lines(tmp_path)[0].items() if "rate" in k} == {
        "learning_rate": 1.0,
        "learning_rate/v_proj": 2.0,
    }


def test_evaluation_line_has_loss_and_perplexity(tmp_path: Path, clock: Clock) -> None:
    log = make_log(tmp_path, clock)
    log.start(0, 0)
    log.evaluation(5, 2.0, 500)
    log.evaluation(6, 1e9, 600)
    first, second = lines(tmp_path)
    assert (first["step"], first["eval_loss"], first["eval_perplexity"], first["tokens"]) == (5, 2.0, 7.389056, 500)
    # JSON has no infinity.
    assert second["eval_perplexity"] is None


def test_speed_is_that_of_training_since_the_last_line_without_pauses(tmp_path: Path, clock: Clock) -> None:
    log = make_log(tmp_path, clock)
    log.start(4, 1000)
    clock.now += 2.0
    log.step(5, [1.0], {"base": 1.0}, 1.0, 1100)
    with log.paused():
        clock.now += 50.0
    clock.now += 1.0
    log.step(6, [1.0], {"base": 1.0}, 1.0, 1200)
    assert [line["tokens_per_second"] for line in lines(tmp_path)] == [50.0, 100.0]


def test_resumed_log_drops_later_and_broken_lines_and_keeps_the_rest(tmp_path: Path, clock: Clock) -> None:
    first = make_log(tmp_path, clock)
    first.start(0, 0)
    for step in (1, 2, 3):
        first.step(step, [float(step)], {"base": 1.0}, 1.0, step)
    first.evaluation(2, 1.0, 2)
    kept = [line for line in lines(tmp_path) if line["step"] <= 2]
    with first.path.open("a") as file:
        file.write('{"step": 2, "lo')  # a kill in the middle of a write
    second = make_log(tmp_path, clock)
    second.start(2, 2)
    second.step(3, [9.0], {"base": 1.0}, 1.0, 3)
    assert lines(tmp_path)[:-1] == kept
    assert [(line["step"], line.get("loss")) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (2, None), (3, 9.0)]


def test_other_ranks_write_and_show_nothing(tmp_path: Path, clock: Clock) -> None:
    stream = StringIO()
    log = make_log(tmp_path, clock, is_main=False, console=PlainConsole(CPU, Console(file=stream)))
    log.start(0, 0)
    log.step(1, [1.0], {"base": 1.0}, 1.0, 1)
    log.evaluation(1, 1.0, 1)
    log.note("text")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert stream.getvalue() == ""


def test_trackers_receive_every_record(tmp_path: Path, clock: Clock) -> None:
    seen: list[tuple[dict[str, float], int]] = []
    log = make_log(tmp_path, clock, track=lambda values, step: seen.append((dict(values), step)))
    log.start(0, 0)
    log.step(1, [1.5], {"base": 1e-3}, 2.0, 7)
    log.evaluation(1, 0.5, 7)
    (training, first), (evaluation, second) = seen
    assert (first, second) == (1, 1)
    assert (training["loss"], training["grad_norm"], training["tokens"]) == (1.5, 2.0, 7)
    assert evaluation["eval_loss"] == 0.5


def test_plain_console_prints_one_complete_line_per_record(tmp_path: Path, clock: Clock) -> None:
    stream = StringIO()
    with closing(make_log(tmp_path, clock, console=make_console(CPU, Console(file=stream)))) as log:
        log.start(0, 0)
        clock.now += 20.0
        log.step(2, [1.93], {"base": 1e-4}, 1.0, 104200)
        log.evaluation(2, 1.0, 104200)
    training, evaluation = stream.getvalue().splitlines()
    # Ten seconds per step, eight steps left.
    assert re.fullmatch(
        r"step 2/10 loss 1\.9300 lr 1\.00e-04 tok/s 5210 mem \d+\.\d/\d+\.\d GiB eta 01:20", training
    ), training
    assert evaluation == "step 2/10 eval_loss 1.0000 eval_perplexity 2.718"


def test_terminal_gets_a_bar_with_the_same_numbers(clock: Clock, tmp_path: Path) -> None:
    stream = StringIO()
    console = make_console(CPU, Console(file=stream, force_terminal=True, width=160))
    assert isinstance(console, BarConsole)
    with closing(make_log(tmp_path, clock, console=console)) as log:
        log.start(0, 0)
        clock.now += 3600.0
        log.step(1, [1.93], {"base": 1e-4}, 1.0, 36_000)
        log.note("saved [bold]checkpoint-1")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "step 1/10" in text
    assert "loss 1.9300 lr 1.00e-04 tok/s 10 mem" in text
    assert "eta 9:00:00" in text
    assert "saved [bold]checkpoint-1" in text


@pytest.fixture
def big_block() -> Iterator[int]:
    block = bytearray(300 * 2**20)
    block[:: 2**12] = b"x" * (len(block) // 2**12)
    yield len(block)
    del block


def test_peak_memory_counts_what_is_resident(big_block: int) -> None:
    assert peak_memory_gib(CPU) > big_block / 2**30


def test_peak_memory_does_not_fall_when_memory_is_freed() -> None:
    before = peak_memory_gib(CPU)
    block = torch.ones(64, 2**20)
    high = peak_memory_gib(CPU)
    del block
    assert peak_memory_gib(CPU) >= high >= before
