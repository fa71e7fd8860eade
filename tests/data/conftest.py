"""A byte-level tokenizer with a ChatML template, and samples made of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import byte_tokenizer

from qaft.data.files import Provenance
from qaft.data.samples import Sample


@pytest.fixture(scope="session")
def chatml() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def plain() -> Any:
    return byte_tokenizer(None, bos=True)


@pytest.fixture
def make_tokenizer() -> Callable[..., Any]:
    return byte_tokenizer


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines and returns the file."""

    def write(rows: Sequence[dict[str, Any]], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def numbered_samples() -> Callable[[Sequence[int]], list[Sample]]:
    """Samples of the given lengths whose tokens name them: 100 * index + position, all trained."""

    def make(lengths: Sequence[int]) -> list[Sample]:
        return [
            Sample(ids := np.arange(n, dtype=np.int32) + 100 * i, ids, Provenance("numbered", i + 1))
            for i, n in enumerate(lengths)
        ]

    return make
