"""Two processes of one group that run a script of the tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from types import MappingProxyType

import qaft

WORLD = 2
LIMIT = 1200.0
"""Seconds after which the processes count as stuck."""


def run_ranks(script: Path, *arguments: str, environment: Mapping[str, str] = MappingProxyType({})) -> None:
    """Run a script in two processes of one group, with variables added; raises when one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1"}
    common = {**os.environ, **world, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **environment}
    places = (Path(qaft.__file__).parents[1], Path(__file__).resolve().parent)
    common["PYTHONPATH"] = os.pathsep.join(map(str, places))
    with ExitStack() as stack:
        outputs = [stack.enter_context(TemporaryFile("w+")) for _ in range(WORLD)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank, output in enumerate(outputs)
        ]
        try:
            codes = [process.wait(timeout=LIMIT) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            for output in outputs:
                output.seek(0)
            raise AssertionError("\n".join([f"exit codes {codes}", *(output.read() for output in outputs)]))
