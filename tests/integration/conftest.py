"""Base models of the integration tests: a random one, a trained one where it is, and that of the launcher trials."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import LIMIT, RECIPE, ROOT, THREE_STEPS, TRAIN, run

Base = Callable[[str], Path]


@pytest.fixture(scope="session")
def base(request: pytest.FixtureRequest) -> Base:
    """Returns the folder of ``tiny_llama`` or ``stories260k``; the test is skipped where the latter is missing."""
    return request.getfixturevalue


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the README's preparatory command for configs/tiny_cpu.yaml has been run."""
    folder = tmp_path_factory.mktemp("workplace")
    subprocess.run([sys.executable, str(ROOT / "launch" / "tiny_model.py")], cwd=folder, check=True, timeout=LIMIT)
    return folder


@pytest.fixture(scope="session")
def single(workplace: Path) -> Path:
    """Run folder of three steps of configs/tiny_cpu.yaml by one process without a launcher."""
    code, output = run([sys.executable, TRAIN, RECIPE, *THREE_STEPS, "train.output=single"], workplace)
    assert code == 0, output
    return workplace / "single"
