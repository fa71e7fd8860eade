"""A process that dies between two renames, as by SIGKILL: no handler of it runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

SIGNAL = 9


def killed_in_rename(monkeypatch: pytest.MonkeyPatch, call: int, act: Callable[[], object]) -> None:
    """Let a child process ``act`` and die in its rename number ``call``, or after the last, when it cleans up."""
    pid = os.fork()
    if pid == 0:
        renames = iter(range(9))
        rename = Path.rename

        def killed(path: Path, target: Path) -> Path:
            return os._exit(SIGNAL) if next(renames) == call else rename(path, target)

        monkeypatch.setattr(Path, "rename", killed)
        monkeypatch.setattr(shutil, "rmtree", lambda path, **_: os._exit(SIGNAL) if ".old-" in str(path) else None)
        act()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == SIGNAL
