from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from qaft.data.sources import read_rows
from qaft.errors import DataError

ROWS = [{"text": 'é, "x"\ny'}, {"text": "2020-01-01"}, {"text": "001"}]


def _jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def _json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1))


def _csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text"])
        writer.writeheader()
        writer.writerows(ROWS)


def _parquet(path: Path) -> None:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    datasets.enable_progress_bars()


@pytest.mark.parametrize(
    ("name", "write"), [("a.jsonl", _jsonl), ("a.json", _json), ("a.csv", _csv), ("a.parquet", _parquet)]
)
def test_every_file_type_gives_back_the_rows_that_were_written(
    tmp_path: Path, name: str, write: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / name)
    rows = read_rows(str(tmp_path / name), split="train")
    assert [row.fields for row in rows] == ROWS
    assert [row.fields for row in rows] == ROWS  # a second pass reads again
    assert capsys.readouterr().out == ""


def test_a_parquet_row_is_known_by_its_number(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet")
    assert [str(row.source)[-5:] for row in read_rows(str(tmp_path / "a.parquet"), split="train")] == [
        "row 1",
        "row 2",
        "row 3",
    ]


def test_limit_uses_the_first_rows(write_rows: Callable[..., Path]) -> None:
    path = write_rows([{"text": str(i)} for i in range(5)])
    assert [row.fields["text"] for row in read_rows(str(path), split="train", limit=2)] == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, r"a\.jsonl: no such file \(looked in .*\)"),
        ("a.txt", b"x", r"unknown extension '\.txt'; allowed: \.jsonl, \.json, \.csv, \.parquet"),
        ("a.parquet.gz", b"x", "unknown extension"),
        ("a.jsonl", b"", "holds no row"),
        ("a.jsonl", b"\n \n", "holds no row"),
        ("a.csv", b"text\n", "holds no row"),
        ("a.json", b"[]", "holds no row"),
        ("a.parquet", b"not parquet", "a.parquet: "),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(str(path), split="train"))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        read_rows(str(tmp_path), split="train")


def test_a_slice_of_a_local_file_is_refused_and_not_ignored(write_rows: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"train\[:5%\].*use data.limit"):
        read_rows(str(write_rows([{"text": "a"}])), split="train[:5%]")


def test_a_hub_id_is_loaded_with_its_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(*args: Any, **options: Any) -> list[dict[str, Any]]:
        calls.append((args, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_rows("org/set:part", split="train[:5%]", limit=2))
    assert calls == [(("org/set", "part"), {"split": "train[:5%]"})]
    assert [row.fields for row in rows] == ROWS[:2]
    assert str(rows[1].source) == "org/set:part (train[:5%]), row 2"


def test_a_hub_failure_is_a_data_error_and_leaves_the_library_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> None:
        assert datasets.are_progress_bars_disabled()
        raise ValueError("Unknown split 'trian'")

    monkeypatch.setattr(datasets, "load_dataset", load)
    before = (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled())
    with pytest.raises(DataError, match=r"set: no local file.*split 'trian'.*Unknown split"):
        list(read_rows("set", split="trian"))
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before
