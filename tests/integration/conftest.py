"""The two base models of the integration tests: a random one that is always there, and a trained one where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Base = Callable[[str], Path]


@pytest.fixture(scope="session")
def base(request: pytest.FixtureRequest) -> Base:
    """Returns the folder of ``tiny_llama`` or ``stories260k``; the test is skipped where the latter is missing."""
    return request.getfixturevalue
