"""Checkpoints that all export tests read and none changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    written: dict[tuple[str, bool, torch.dtype], Path] = {}

    def make(family: str = "llama", tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
        key = (family, tied, dtype)
        if key not in written:
            folder = tmp_path_factory.mktemp(f"{family}-{'tied' if tied else 'untied'}")
            written[key] = write_checkpoint(folder, family=family, tied=tied, dtype=dtype)
        return written[key]

    return make
