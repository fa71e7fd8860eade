from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qaft.data.report import DataReport, data_report, print_report
from qaft.sections import DataSection, TrainSection


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


@pytest.fixture
def report(plain: Any, write_rows: Callable[..., Path]) -> DataReport:
    train = write_rows([pair("ab", "cd"), pair("x", "y" * 5), pair("ab", "cd"), pair("p", "q" * 90)], "train.jsonl")
    valid = write_rows([pair("ab", "cd"), pair("other", "z")], "valid.jsonl")
    data = DataSection(train=str(train), valid=str(valid), max_length=40)
    return data_report(data, TrainSection(steps=6, batch_size=2, grad_accumulation=1), plain, num_excerpts=2)


def printed(report: DataReport, **options: Any) -> str:
    stream = StringIO()
    print_report(report, Console(file=stream, width=200, **options))
    return stream.getvalue()


def test_the_numbers_are_those_of_the_data(report: DataReport) -> None:
    # Tokens with BOS and EOS: 6, 8, 6, and 93 cut to 40.
    assert (report.num_samples, report.num_valid, report.num_tokens) == (4, 2, 60)
    assert report.trained_share == (3 + 6 + 3 + 38) / 60
    assert (report.truncated, report.dropped) == (1, 0)
    assert (report.duplicates, report.overlap) == (1, 1)
    assert report.rows_per_epoch == 2
    assert report.packing_efficiency == 60 / 80
    assert (report.steps_per_epoch, report.epochs) == (1.0, 6.0)


def test_the_histogram_counts_lengths_before_the_cut(report: DataReport) -> None:
    filled = {(begin, end): number for begin, end, number in report.histogram if number}
    assert filled == {(4, 8): 2, (8, 12): 1, (41, None): 1}
    assert sum(number for _, _, number in report.histogram) == 4


@pytest.mark.parametrize("max_length", [8, 13, 1024])
def test_the_bins_of_the_histogram_cover_every_length_once(
    plain: Any, write_rows: Callable[..., Path], max_length: int
) -> None:
    path = write_rows([{"text": "a" * n} for n in range(1, max_length + 3)])
    report = data_report(DataSection(train=str(path), max_length=max_length), TrainSection(), plain)
    assert sum(number for _, _, number in report.histogram) == max_length + 2
    assert report.histogram[-1][2] == 4


def test_excerpts_show_what_is_trained_with_every_space(plain: Any, write_rows: Callable[..., Path]) -> None:
    path = write_rows([pair("It was", " great")])
    (excerpt,) = data_report(DataSection(train=str(path)), TrainSection(), plain).excerpts
    assert excerpt.stretches == (("<s>It was", False), (" great<|im_end|>", True))
    assert excerpt.source == f"{path}, line 1"


def test_a_file_gets_marks_instead_of_colour(report: DataReport) -> None:
    text = printed(report)
    assert "<s>ab[[cd<|im_end|>]]" in text
    assert "\x1b[" not in text
    assert "samples     4, 2 for validation" in text
    assert "too long    1 truncated, 0 dropped" in text
    assert "duplicates  1 within train, 1 of validation also in train" in text
    assert "rows        2 per epoch, 75.0% filled" in text
    assert "note        train: format prompt_completion (detected); fields: prompt, completion" in text
    assert text.count("trained text in [[ ]]") == 2


def test_a_terminal_gets_colour_and_no_marks(report: DataReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = printed(report, force_terminal=True, color_system="standard")
    assert "\x1b[1;32mcd<|im_end|>" in text
    assert "[[cd" not in text


def test_no_color_gets_marks_on_a_terminal_too(report: DataReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[cd<|im_end|>]]" in printed(report, force_terminal=True, color_system="standard")


def test_the_middle_of_a_long_text_is_left_out(plain: Any, write_rows: Callable[..., Path]) -> None:
    path = write_rows([pair("p" * 5000, "c")])
    text = printed(data_report(DataSection(train=str(path), max_length=6000), TrainSection(), plain))
    assert "... 4,403 characters ..." in text  # 5,000 and the 3 of <s>, less 600
