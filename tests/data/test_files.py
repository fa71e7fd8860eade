from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qaft.data.files import Row, read_csv, read_json, read_json_lines
from qaft.errors import DataError


def test_a_json_line_keeps_its_line_number_across_blank_lines_crlf_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b"}\r\n{"text": "c"}')
    rows = list(read_json_lines(path))
    assert [(row.fields["text"], row.source.number) for row in rows] == [("a", 1), ("b", 4), ("c", 5)]
    assert str(rows[1].source) == f"{path}, line 4"


def test_values_stay_what_is_written(tmp_path: Path) -> None:
    written = [{"text": "2020-01-01", "n": 1}, {"text": "2020-01-02T10:00:00", "n": 1.5, "extra": [1, "a"]}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in written))
    assert [row.fields for row in read_json_lines(path)] == written


def test_text_with_unusual_line_separators_is_one_line(tmp_path: Path) -> None:
    text = "é\u2028x\u0085\x0b😀"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row.fields["text"] for row in read_json_lines(path)] == [text]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text":', "not JSON"),
        (b'{"text": "\xe9"}', "not UTF-8"),
        (b'"text"', "found str, must be an object"),
        (b"[1]", "found list, must be an object"),
    ],
)
def test_a_broken_json_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: {reason}"):
        list(read_json_lines(path))


def test_the_objects_of_a_json_array_have_the_line_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n[ {"a": 1}, {"a":\n 2},\n\n{"a": "]"}\n]\n')
    assert [(row.fields["a"], row.source.number) for row in read_json(path)] == [(1, 2), (2, 2), ("]", 5)]


def test_a_json_file_without_an_array_holds_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert [row.fields["a"] for row in read_json(path)] == [1, 2]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[{"a": 1},\n{"a": }]', 2),
        ('[{"a": 1}\n{"a": 2}]', 2),
        ('[{"a": 1},\n', 2),
        ('[{"a": 1},\n 3]', 2),
        ('[{"a": 1}]\n\nmore', 1),
    ],
)
def test_a_broken_json_array_is_named_with_its_line(tmp_path: Path, content: str, line: int) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"a\.json, line {line}: "):
        list(read_json(path))


def test_cells_of_a_csv_stay_strings_and_rows_keep_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('text,label\r\n"a\r\nb, c",01\r\n\r\nNA,\r\né,"say ""x"""\r\n'.encode())
    assert [(row.fields, row.source.number) for row in read_csv(path)] == [
        ({"text": "a\r\nb, c", "label": "01"}, 2),
        ({"text": "NA", "label": ""}, 5),
        ({"text": "é", "label": 'say "x"'}, 6),
    ]


def test_a_csv_cell_may_be_longer_than_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text\n{'x' * 200_000}\n")
    assert [len(row.fields["text"]) for row in read_csv(path)] == [200_000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label\na,b\nc,d,e\n", "line 3: found 3 cells, but the header has 2"),
        (b"text,label\na\n", "line 2: found 1 cells"),
        (b"text,text\na,b\n", "line 1: the header"),
        (b"text,label\na,b\n\xe9,c\n", "line 3: not UTF-8"),
        (b'text,label\na,b\n"c"d,e\n', "line 3: not CSV"),
    ],
)
def test_a_broken_csv_row_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_csv(path))


@pytest.mark.parametrize(
    ("reader", "content"),
    [
        (read_json_lines, b'{"text": "a"}\n\n{"text": "b"}\n'),
        (read_json, b'[{"text": "a"},\n{"text": "b"}]'),
        (read_csv, b"text\na\nb\n"),
    ],
)
def test_a_gzipped_file_gives_the_rows_of_the_plain_one(
    tmp_path: Path, reader: Callable[[Path], Iterator[Row]], content: bytes
) -> None:
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    plain, zipped = list(reader(tmp_path / "a")), list(reader(tmp_path / "a.gz"))
    assert [(r.fields, r.source.number) for r in plain] == [(r.fields, r.source.number) for r in zipped]
    assert [r.fields["text"] for r in zipped] == ["a", "b"]
