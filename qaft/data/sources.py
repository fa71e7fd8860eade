"""From the name of a data set to its rows: local files by extension, everything else by hub id.

data/train.jsonl   .jsonl .json .csv, each also .gz: read line by line (files.py)
data/train.parquet                                  through the ``datasets`` library
org/name, org/name:config                           through the ``datasets`` library; split may be a slice, train[:5%]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from qaft.data.files import Provenance, Row, read_csv, read_json, read_json_lines
from qaft.errors import DataError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Rows:
    """The rows of one data set, read anew from the source on every iteration; only one row is held at a time.

    Attributes:
        name: file or hub id, for messages.
        open: starts reading.
        limit: yield at most this many rows; None for all.
    """

    name: str
    open: Callable[[], Iterator[Row]]
    limit: int | None = None

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows in file order.

        Raises:
            DataError: the source cannot be read, is broken (the message names the line), or holds no row.
        """
        empty = True
        try:
            for row in islice(self.open(), self.limit):
                empty = False
                yield row
        except (OSError, EOFError) as error:
            raise DataError(f"{self.name}: cannot be read: {error}") from error
        if empty:
            raise DataError(f"{self.name}: holds no row; give a file with at least one record")


def read_rows(spec: str, *, split: str, limit: int | None = None) -> Rows:
    """Return the rows of a local file or of a data set on the hub.

    Args:
        spec: path, hub id, or ``id:config``.
        split: split of a hub data set, ``train`` or ``train[:5%]``. A local file is one split, whatever its name.
        limit: use only the first rows.

    Raises:
        DataError: no such file, a folder, or an extension that is not known; reading errors come with the iteration.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        raise DataError(f"{spec}: is a folder; give one file ({', '.join(READERS)}) or a hub id")
    reader = _reader(path)
    if reader is None and not path.exists() and HUB_ID.fullmatch(spec):
        return Rows(spec, partial(_read_hub, spec, split), limit)
    if not path.is_file():
        raise DataError(f"{spec}: no such file (looked in {path.parent.resolve()}); check the path")
    if reader is None:
        allowed = f"{', '.join(READERS)}, the first three also with .gz"
        raise DataError(f"{spec}: unknown extension {path.suffix!r}; allowed: {allowed}")
    if "[" in split:
        raise DataError(f"{spec}: split {split!r} is a slice, which a local file does not have; use data.limit")
    return Rows(spec, partial(reader, path), limit)


def _reader(path: Path) -> Callable[[Path], Iterator[Row]] | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        return {k: v for k, v in READERS.items() if k != ".parquet"}.get("".join(suffixes[-2:-1]))
    return READERS.get("".join(suffixes[-1:]))


def _read_parquet(path: Path) -> Iterator[Row]:
    # Streaming reads the file itself; the other mode first copies it into a cache in the home folder.
    options = {"data_files": [str(path)], "split": "train", "streaming": True}
    yield from _numbered(str(path), _load("parquet", name=str(path), refused="not a parquet file", **options))


def _read_hub(spec: str, split: str) -> Iterator[Row]:
    identifier, _, config = spec.partition(":")
    refused = f"no local file of this name, and as a data set it cannot be loaded (split {split!r})"
    table = _load(identifier, config or None, name=spec, refused=refused, split=split)
    yield from _numbered(f"{spec} ({split})", table)


def _numbered(name: str, table: Any) -> Iterator[Row]:
    try:
        for number, fields in enumerate(table, start=1):
            yield Row(fields, Provenance(name, number, "row"))
    # A table is decoded while it is read, by code that raises its own errors; they mean the same to the user.
    except Exception as error:
        raise DataError(f"{name}: cannot be read: {error}") from error


def _load(identifier: str, *args: Any, name: str, refused: str, **options: Any) -> Any:
    # Imported late because it takes a second, and most runs read files that do not need it.
    import datasets

    with _quiet(datasets):
        try:
            return datasets.load_dataset(identifier, *args, **options)
        # The library raises anything from ValueError to its own and its client's errors.
        except Exception as error:
            raise DataError(f"{name}: {refused}: {error}") from error


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Keep progress bars and log lines of the library away, and leave its settings as they were."""
    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": _read_parquet,
}
"""Readers by extension."""
