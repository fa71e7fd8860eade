"""What a run reports: one JSON line per record in ``metrics.jsonl``, and a bar or plain lines on the console."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from qaft.train.console import Console
from qaft.train.groups import BASE_GROUP

METRICS = "metrics.jsonl"
"""Name of the log inside a run folder."""

Tracker = Callable[[Mapping[str, float], int], None]
"""Takes values and their step (``AccelerateEngine.track``)."""


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory in use since the process began: allocated on the GPU, else resident in RAM, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: Linux hands a child the maximum of the process that started it.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 2**20
    import psutil

    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss) / 2**30


class RunLog:
    """Writes the records of one run; silent on every rank but 0.

    Each line of ``metrics.jsonl`` has ``step``, ``tokens`` (trained on so far) and ``time`` (UTC); training lines add
    ``loss`` (mean over the steps since the last line), ``learning_rate`` (base group; others as
    ``learning_rate/<pattern>``), ``grad_norm`` (before clipping), ``tokens_per_second`` and ``peak_memory_gib``;
    evaluation lines add ``eval_loss`` and, of losses per token, ``eval_perplexity``; lines of diagnostics
    ``quantization/<quantity>[/layer]`` (see diagnostics.py). Names are the transformers Trainer's where it has one.

    Args:
        folder: the run folder.
        total_steps: optimizer steps of the whole run.
        device: whose memory is reported.
        console: shows progress; None for none.
        is_main: whether this is rank 0.
        track: receives every record too.
        per_token: the loss is that of tokens, which has a perplexity, and not of choices between options.
        clock: seconds from an arbitrary start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        device: torch.device,
        console: Console | None = None,
        is_main: bool = True,
        track: Tracker | None = None,
        per_token: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = folder / METRICS
        self._total_steps = total_steps
        self._device = device
        self._console = console if is_main else None
        self._is_main = is_main
        self._track = track
        self._per_token = per_token
        self._clock = clock
        self._paused_seconds = 0.0
        self._start = self._last = (0, 0, 0.0)  # step, tokens, training seconds

    def start(self, step: int, tokens: int) -> None:
        """Begin at ``step`` with ``tokens`` behind: later lines of an earlier attempt are dropped, the clock starts."""
        if self._is_main:
            _drop_lines_after(self.path, step)
        self._start = self._last = (step, tokens, self._seconds())

    def step(
        self,
        step: int,
        losses: Sequence[float],
        learning_rates: Mapping[str, float],
        grad_norm: float,
        tokens: int,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Record finished steps.

        Args:
            step: number of the last finished step, from 1.
            losses: mean loss of each step since the last record.
            learning_rates: by group name, as used by the last step.
            grad_norm: of the last step, before clipping.
            tokens: trained on so far.
            metrics: what the gradient source measured in the last step.
        """
        seconds = self._seconds()
        _, last_tokens, last_seconds = self._last
        self._last = (step, tokens, seconds)
        first = next(iter(learning_rates))
        record: dict[str, float] = {"step": step, "loss": sum(losses) / len(losses)}
        for name, rate in learning_rates.items():
            # Without a base group the first pattern takes the plain name, so that every log has it.
            is_base = name == BASE_GROUP or (name == first and BASE_GROUP not in learning_rates)
            record["learning_rate" if is_base else f"learning_rate/{name}"] = rate
        record |= {
            "grad_norm": grad_norm,
            "tokens": tokens,
            "tokens_per_second": (tokens - last_tokens) / max(seconds - last_seconds, 1e-9),
            "peak_memory_gib": peak_memory_gib(self._device),
            **(metrics or {}),
        }
        self._write(record)
        if self._console is not None:
            self._console.step(record, self._total_steps, self._eta(step, seconds))

    def values(self, step: int, values: Mapping[str, float], tokens: int) -> None:
        """Record further values of a finished step, on a line of their own; they do not appear on the console."""
        self._write({"step": step, **values, "tokens": tokens})

    def evaluation(self, step: int, loss: float, tokens: int) -> None:
        """Record a mean validation loss in nats per target, and its perplexity where targets are tokens."""
        perplexity = {"eval_perplexity": math.exp(loss) if loss < math.log(1e300) else math.inf}
        shown = perplexity if self._per_token else {}
        self._write({"step": step, "eval_loss": loss, **shown, "tokens": tokens})
        values = "".join(f" {name} {value:.4g}" for name, value in shown.items())
        self.note(f"step {step}/{self._total_steps} eval_loss {loss:.4f}{values}")

    def note(self, text: str) -> None:
        """Show a line on the console."""
        if self._console is not None:
            self._console.note(text)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the time of the block (evaluation, checkpoints) out of tokens per second and the time left."""
        begin = self._clock()
        try:
            yield
        finally:
            self._paused_seconds += self._clock() - begin

    def close(self) -> None:
        """Take the bar off the console."""
        if self._console is not None:
            self._console.close()

    def _seconds(self) -> float:
        return self._clock() - self._paused_seconds

    def _eta(self, step: int, seconds: float) -> float:
        """Return the training seconds left at the mean speed of this process; evaluations come on top."""
        first_step, _, first_seconds = self._start
        return (self._total_steps - step) * (seconds - first_seconds) / max(step - first_step, 1)

    def _write(self, record: Mapping[str, float]) -> None:
        if not self._is_main:
            return
        line: dict[str, Any] = {name: _rounded(value) for name, value in record.items()}
        line["time"] = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._track is not None:
            self._track({name: value for name, value in record.items() if name != "step"}, int(record["step"]))


def _rounded(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    # Seven digits are all an fp32 loss has; JSON knows neither inf nor nan.
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _drop_lines_after(path: Path, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _step_of(line: str) -> float:
    """Return the step of a line; a line that a kill cut short belongs to no step and is dropped."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
