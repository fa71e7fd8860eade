"""Jobs that tests start through launchers, and what is left of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
RECIPE = str(ROOT / "configs" / "tiny_cpu.yaml")
THREE_STEPS = ["train.steps=3", "train.eval_every=null", "train.save_every=null"]
FAULTY = str(Path(__file__).with_name("faulty_train.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
LIMIT = 120.0
"""Seconds after which a job counts as stuck; none takes a quarter of it."""

MARK = "QAFT_TEST_JOB"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Job:
    """A launcher under way; every process that it has ever started carries the same mark in its environment."""

    launcher: subprocess.Popen[str]
    mark: str

    def finish(self) -> tuple[int, str]:
        """Exit code and output."""
        try:
            output, _ = self.launcher.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired as stuck:
            said = stuck.output.decode() if isinstance(stuck.output, bytes) else stuck.output
            raise AssertionError(f"still running after {LIMIT:.0f} s:\n{said}") from None
        return self.launcher.returncode, output

    def processes(self) -> list[psutil.Process]:
        """Those of the job that are alive."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait_for_end(self) -> list[psutil.Process]:
        """What is still alive after LIMIT seconds: nothing, if all goes well."""
        return psutil.wait_procs(self.processes(), timeout=LIMIT)[1]

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + LIMIT
        while not path.exists():
            assert self.launcher.poll() is None, f"ended before it wrote {path.name}:\n{self.finish()[1]}"
            assert time.monotonic() < deadline, f"no {path.name}"
            time.sleep(0.05)


@contextmanager
def start(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Job]:
    """Run ``command`` in ``folder`` with one thread per process; nothing of it survives the block."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    mark = uuid4().hex
    given = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        MARK: mark,
        **(environment or {}),
    }
    launcher = subprocess.Popen(
        command,
        cwd=folder,
        env=inherited | given,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    job = Job(launcher, mark)
    with launcher:
        try:
            yield job
        finally:
            for process in job.processes():
                process.send_signal(signal.SIGKILL)


def run(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit code and output of a job that ends by itself and leaves no process behind."""
    with start(command, folder, environment) as job:
        code, output = job.finish()
        assert not job.wait_for_end(), output
    return code, output


def own_lines(output: str) -> list[str]:
    """The lines of an output in which a rank says why it ended."""
    return [line for line in output.splitlines() if line.startswith("rank ")]


def records(folder: Path) -> list[dict[str, Any]]:
    """Of every training and evaluation record of a run, what does not depend on the machine."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    varying = ("time", "tokens_per_second", "peak_memory_gib")
    trained = [line for line in lines if "loss" in line or "eval_loss" in line]
    return [{k: v for k, v in line.items() if k not in varying} for line in trained]
