"""One process among those of a launcher: what the environment says of it, and how it ends when one of them fails.

Every launcher stops the whole job when it finds a process that has failed, and reports that process's exit code. Which
one it finds first must therefore be the one that failed: a process that only lost its connection to it, or that is
about to say the same as its neighbour, waits to be stopped. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import NoReturn

LOST_PEER_SECONDS = 20.0
"""How long a process that lost another one waits for its launcher; deepspeed's looks once a second."""

TWIN_SECONDS = 2.0
"""How long processes but the first of a host wait before they say what went wrong: it may be about to say the same."""

_PR_SET_PDEATHSIG = 1
_LAUNCHER_VARIABLES = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")


def rank() -> int:
    """Return the index of this process in the job; 0 when it is alone."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes in the job."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_launcher() -> None:
    """Prepare this process for its place in a job; without a launcher nothing happens. Call it before importing torch.

    The cores of the host are divided among its processes where ``OMP_NUM_THREADS`` is not set, and the kernel (Linux)
    sends SIGTERM (save and exit) to this process when its launcher dies.
    """
    # deepspeed's launcher says LOCAL_SIZE, torchrun's LOCAL_WORLD_SIZE.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if sys.platform == "linux" and any(name in os.environ for name in _LAUNCHER_VARIABLES):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def lost_peer(error: BaseException) -> bool:
    """Return whether ``error`` only says that another process of the job is gone."""
    if world_size() == 1:
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    # gloo raises plain RuntimeErrors that name its source file; NCCL and the store have torch's DistError.
    return "DistError" in names or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def wait_for_launcher(error: BaseException) -> None:
    """Wait, so that the launcher can end this process before it speaks, when another one is the cause of ``error``."""
    if world_size() == 1:
        return
    if lost_peer(error):
        time.sleep(LOST_PEER_SECONDS)
    elif int(os.environ.get("LOCAL_RANK", 0)) != 0:
        time.sleep(TWIN_SECONDS)


def end_failed(code: int) -> NoReturn:
    """End this process with an exit code that is not 0.

    One of several processes ends at once: leaving the group would wait for a collective that the others never join, and
    staying in it while the interpreter ends can abort the process with another code than its own.
    """
    if world_size() == 1:
        raise SystemExit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
