"""Progress on a console: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import psutil
import torch
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn


class Console(Protocol):
    """Shows training records and notes."""

    def step(self, record: Mapping[str, float], total_steps: int, eta_seconds: float) -> None:
        """Show a training record (the names of ``metrics.jsonl``)."""
        ...

    def note(self, text: str) -> None:
        """Show a line that stays."""
        ...

    def close(self) -> None:
        """Leave the console as it was."""
        ...


def make_console(device: torch.device, output: RichConsole | None = None) -> Console:
    """Return a bar when ``output`` (default: standard output) is a terminal, else plain lines.

    Args:
        device: whose memory is shown.
        output: the console of the command line, so that its other lines appear above the bar.
    """
    output = output or RichConsole()
    return BarConsole(device, output) if output.is_terminal else PlainConsole(device, output)


class PlainConsole:
    """``step 120/1000 loss 1.93 lr 1e-04 tok/s 5210 mem 11.2/24.0 GiB eta 00:41``, one line per record."""

    def __init__(self, device: torch.device, output: RichConsole) -> None:
        self._memory = _total_memory_gib(device)
        self._output = output

    def step(self, record: Mapping[str, float], total_steps: int, eta_seconds: float) -> None:
        """Print one line."""
        self.note(f"step {record['step']}/{total_steps} {_summary(record, self._memory, eta_seconds)}")

    def note(self, text: str) -> None:
        """Print the line."""
        # soft_wrap: a log file has no width at which a line would have to break.
        self._output.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Do nothing: every line is complete."""


class BarConsole:
    """One line that is drawn over and over: a bar and the same numbers as the plain line."""

    def __init__(self, device: torch.device, output: RichConsole) -> None:
        self._memory = _total_memory_gib(device)
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[summary]}"))
        self._bar = Progress(*columns, console=output, refresh_per_second=4)
        self._task = self._bar.add_task("train", total=None, summary="")

    def step(self, record: Mapping[str, float], total_steps: int, eta_seconds: float) -> None:
        """Redraw the line."""
        self._bar.start()
        summary = _summary(record, self._memory, eta_seconds)
        self._bar.update(self._task, completed=record["step"], total=total_steps, summary=summary)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Draw the line a last time and give the terminal back."""
        self._bar.stop()


def _total_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return psutil.virtual_memory().total / 2**30


def _summary(record: Mapping[str, float], total_memory_gib: float, eta_seconds: float) -> str:
    minutes, seconds = divmod(round(eta_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    eta = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
    return (
        f"loss {record['loss']:.4f} lr {record['learning_rate']:.2e} tok/s {record['tokens_per_second']:.0f} "
        f"mem {record['peak_memory_gib']:.1f}/{total_memory_gib:.1f} GiB eta {eta}"
    )
