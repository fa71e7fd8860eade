"""Experiment trackers by accelerate's names, for any engine; accelerate itself calls them on rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from qaft.errors import RecipeError
from qaft.registry import suggest


class Trackers:
    """The trackers of ``train.report_to``; without any, every method does nothing.

    Args:
        report_to: names of accelerate trackers.
        folder: where trackers that write files put them.
        cpu: the run stays on the CPU although there is a GPU.

    Raises:
        RecipeError: a tracker is unknown or its package is not installed.
    """

    def __init__(self, report_to: Sequence[str] = (), *, folder: Path | None = None, cpu: bool = False) -> None:
        _check_trackers(report_to)
        self._accelerator = (
            Accelerator(cpu=cpu, mixed_precision="no", log_with=list(report_to), project_dir=folder)
            if report_to
            else None
        )

    def start(self, project: str, config: Mapping[str, Any]) -> None:
        """Open them; ``config`` is flattened to ``section.key``, some take no nesting."""
        if self._accelerator is not None:
            self._accelerator.init_trackers(project, config=_flatten(config))

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send values."""
        if self._accelerator is not None:
            self._accelerator.log(dict(values), step=step)

    def end(self) -> None:
        """Flush and close them."""
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:
                tracker.finish()


def _check_trackers(names: Sequence[str]) -> None:
    # accelerate itself passes over a tracker whose package is missing.
    known = sorted(str(name) for name in LoggerType if name != LoggerType.ALL)
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise RecipeError(f"train.report_to: {name!r} must be one of {', '.join(known)}{suggest(name, known)}")
        if name not in available:
            raise RecipeError(f"train.report_to: {name} cannot be imported; pip install it, or leave it out")


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    flat: dict[str, int | float | str | bool] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
