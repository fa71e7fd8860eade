"""Rows of a local text file with the exact line they stand on: JSON lines, JSON arrays, CSV; plain or gzipped.

These formats are read here and not by a table library, because tables change values without a word: type inference
turned the text "2020-01-01" into a timestamp, 1 into 1.0 next to a float, "01" and "NA" of a CSV into 1 and null, took
the first cell of a CSV row that is one cell too long for its index, and no error knew its line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from qaft.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Provenance(NamedTuple):
    """Where a row stands, for messages.

    Attributes:
        file: path or data set name.
        number: 1-based.
        unit: what ``number`` counts: ``"line"`` of a text file, or ``"row"`` of a table.
    """

    file: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


class Row(NamedTuple):
    """One record: its fields, and where they stand."""

    fields: dict[str, Any]
    source: Provenance


def open_bytes(path: Path) -> IO[bytes]:
    """Return the file opened for reading bytes, decompressed when its name ends in ``.gz``."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # pyright: ignore[reportReturnType]


def read_json_lines(path: Path) -> Iterator[Row]:
    """Yield one row per line that is not blank; CRLF and a byte order mark are accepted.

    Raises:
        DataError: a line is not UTF-8, not JSON, or not an object; the message names the line.
    """
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                source = Provenance(str(path), number)
                yield Row(_object(_parse(line, source), source), source)


def read_json(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON array, each with the line it begins on; without an array the file is JSON lines.

    Raises:
        DataError: the file is not UTF-8, not JSON, or an element is not an object; the message names the line.
    """
    with open_bytes(path) as file:
        content = file.read().removeprefix(BYTE_ORDER_MARK)
    if content.lstrip().startswith(b"["):
        yield from _array_items(_decode(content, str(path)), str(path))
    else:
        yield from read_json_lines(path)


def _array_items(text: str, file: str) -> Iterator[Row]:
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    line, counted = 1, 0
    while text[(position := _skip_space(text, position)) : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        source = Provenance(file, line)
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {error.lineno}: not JSON: {error.msg}; repair or remove it") from error
        yield Row(_object(value, source), source)
        position = _skip_space(text, position)
        following = text[position : position + 1]
        if following not in (",", "]"):
            found = repr(following) if following else "the end of the file"
            where = line + text.count("\n", counted, position)
            raise DataError(f"{file}, line {where}: found {found} after an element of the array; must be ',' or ']'")
        position += following == ","
    if text[position + 1 :].strip():
        line += text.count("\n", counted, position)
        raise DataError(f"{file}, line {line}: text after the end of the array; a .json file holds one array")


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def read_csv(path: Path) -> Iterator[Row]:
    """Yield the rows of a comma-separated file with a header; every value stays the string that is written.

    Raises:
        DataError: not UTF-8, a column without or with the name of another, or a row with another number of cells than
            the header; the message names the line.
    """
    # The limit of the csv module (128 KiB a cell) is one for the whole process and below the size of a document.
    csv.field_size_limit(sys.maxsize)
    with open_bytes(path) as file:
        text = _decode(file.read().removeprefix(BYTE_ORDER_MARK), str(path))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    begins = 1
    try:
        for cells in reader:
            source, begins = Provenance(str(path), begins), reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _header(cells, source)
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{source}: found {len(cells)} cells, but the header has {len(header)} ({', '.join(header)}); "
                    'quote cells that hold commas: "a, b"'
                )
            yield Row(dict(zip(header, cells, strict=True)), source)
    except csv.Error as error:
        raise DataError(f"{path}, line {begins}: not CSV: {error}; check the quotes of this row") from error


def _header(cells: list[str], source: Provenance) -> list[str]:
    if len(set(cells)) < len(cells) or "" in cells:
        raise DataError(f"{source}: the header {cells} must name every column, each once")
    return cells


def _object(value: Any, source: Provenance) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{source}: found {type(value).__name__}, must be an object such as {{"text": "..."}}')
    return value


def _parse(line: bytes, source: Provenance) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        shown = line[:60].decode("utf-8", errors="replace").rstrip()
        raise DataError(
            f"{source}: not JSON ({error.msg} at column {error.colno}), found {shown!r}; "
            "every line must be one complete object: repair or remove it"
        ) from error


def _decode(content: bytes, file: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: not UTF-8; save the file as UTF-8") from error
