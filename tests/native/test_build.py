from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qaft.native import build


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


def test_a_library_is_compiled_once_for_all_processes(_own_cache: Path) -> None:
    assert build.library("hadamard") is not None
    (first,) = (_own_cache / "qaft").iterdir()
    written = first.stat().st_mtime_ns
    build.library.cache_clear()
    assert build.library("hadamard") is not None
    assert [(first, written)] == [(path, path.stat().st_mtime_ns) for path in (_own_cache / "qaft").iterdir()]


def test_without_a_compiler_there_is_no_library(_own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert build.library("hadamard") is None


def test_a_compiler_that_fails_is_reported_and_leaves_nothing(
    _own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = _own_cache / "cxx"
    failing.write_text("#!/bin/sh\necho no such target >&2; exit 1\n", encoding="utf-8")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.warns(UserWarning, match=r"hadamard.cpp cannot be compiled \(.*cxx\), torch will .* no such target"):
        assert build.library("hadamard") is None
    assert list((_own_cache / "qaft").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_reported(_own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    occupied = _own_cache / "file"
    occupied.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(occupied))
    with pytest.warns(UserWarning, match="torch will do its work"):
        assert build.library("hadamard") is None
