from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

import qaft.ranks as ranks
from qaft.cli import main
from qaft.errors import DataError
from qaft.train.signals import StopSignals

GLOO = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in JOB:
        monkeypatch.delenv(name, raising=False)


def job(monkeypatch: pytest.MonkeyPatch, **variables: int) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_a_process_without_a_launcher_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ranks.rank(), ranks.world_size()) == (0, 1)
    job(monkeypatch, RANK=3, WORLD_SIZE=4)
    assert (ranks.rank(), ranks.world_size()) == (3, 4)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (GLOO, True),
        (dist.DistNetworkError("the store is gone"), True),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("CUDA out of memory"), False),
        (DataError("gloo.jsonl: broken"), False),
    ],
)
def test_only_the_loss_of_another_rank_is_taken_for_it(
    monkeypatch: pytest.MonkeyPatch, error: Exception, lost: bool
) -> None:
    assert not ranks.lost_peer(error)
    job(monkeypatch, WORLD_SIZE=2)
    assert ranks.lost_peer(error) is lost


@pytest.mark.parametrize(
    ("error", "environment", "seconds"),
    [
        (DataError("broken"), {}, 0.0),
        (DataError("broken"), {"WORLD_SIZE": 2, "LOCAL_RANK": 0}, 0.0),
        (DataError("broken"), {"WORLD_SIZE": 2, "LOCAL_RANK": 1}, ranks.TWIN_SECONDS),
        (GLOO, {"WORLD_SIZE": 2, "LOCAL_RANK": 0}, ranks.LOST_PEER_SECONDS),
    ],
)
def test_a_rank_waits_for_those_that_speak_before_it(
    monkeypatch: pytest.MonkeyPatch, error: Exception, environment: dict[str, int], seconds: float
) -> None:
    slept = [0.0]
    monkeypatch.setattr(time, "sleep", slept.append)
    job(monkeypatch, **environment)
    ranks.wait_for_launcher(error)
    assert sum(slept) == seconds


IN_A_GROUP = """
import atexit, os, sys
import torch, torch.distributed as dist
from qaft.distributed import connect
from qaft.ranks import end_failed

atexit.register(lambda: print("in a group:", dist.is_initialized(), flush=True))  # runs after what comes later
connect(torch.device("cpu"))
if sys.argv[1:]:
    end_failed(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("arguments", "code", "output"), [((), 0, "in a group: False\n"), (("7",), 7, "")])
def test_no_rank_is_in_a_group_when_its_interpreter_ends(arguments: tuple[str, ...], code: int, output: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ends = [
        subprocess.Popen(
            [sys.executable, "-c", IN_A_GROUP, *arguments],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ends]
    assert ([process.returncode for process in ends], outputs) == ([code, code], [output, output])


def test_a_rank_names_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    job(monkeypatch, RANK=5, WORLD_SIZE=8, LOCAL_RANK=0)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        main(["train", "nowhere.yaml"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("rank 5: RecipeError: nowhere.yaml: no such recipe")


def test_after_a_signal_the_loss_of_a_rank_is_the_signals_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    job(monkeypatch, WORLD_SIZE=2)
    with pytest.raises(SystemExit) as end, StopSignals() as stop:
        stop.received = 15
        raise GLOO
    assert end.value.code == 143
    with pytest.raises(DataError), StopSignals() as stop:
        stop.received = 15
        raise DataError("broken")
    with pytest.raises(RuntimeError, match="closed by peer"), StopSignals():
        raise GLOO


SHOW = (
    "import ctypes, os; from qaft.ranks import join_launcher; join_launcher(); number = ctypes.c_int();"
    "ctypes.CDLL(None).prctl(2, ctypes.byref(number)); print(number.value, os.environ.get('OMP_NUM_THREADS'))"
)


@pytest.mark.skipif(sys.platform != "linux", reason="the signal at the launcher's death is Linux's")
@pytest.mark.parametrize(
    ("environment", "signal_number", "threads"),
    [
        ({}, 0, "None"),
        ({"LOCAL_RANK": 0, "LOCAL_SIZE": 10**6}, 15, "1"),
        ({"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4, "OMP_NUM_THREADS": 3}, 15, "3"),
    ],
)
def test_a_launched_process_shares_the_cores_and_ends_with_its_launcher(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, int], signal_number: int, threads: str
) -> None:
    job(monkeypatch, **environment)
    shown = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True).stdout
    assert shown.split() == [str(signal_number), threads]
