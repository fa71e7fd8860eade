"""The picture of ``qaft report``: losses on top, then for each quantity its course and every layer as it was last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qaft.commands.report import QUANTITIES, History, Series, latest_values, place_of

_UNMEASURED = "0.88"
_ROW_INCHES = 2.1


def draw_history(history: History, path: Path, *, title: str) -> Path:
    """Write the picture (PNG) and return its path.

    Args:
        history: of a run.
        path: where to.
        title: of the picture.
    """
    figure_of(history, title=title).savefig(path, dpi=130)
    return path


def figure_of(history: History, *, title: str) -> Figure:
    """Return the picture: a panel of losses, then for each quantity a panel of curves and a heat map of layers."""
    shown = [quantity for quantity in QUANTITIES if history.quantities.get(quantity)]
    figure = Figure(figsize=(12, 3.2 + _ROW_INCHES * len(shown)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    grid = figure.add_gridspec(1 + len(shown), 2, height_ratios=[1.4, *[1.0] * len(shown)])
    losses = figure.add_subplot(grid[0, :])
    _draw_losses(losses, history)
    colors = _colors(history)
    num_layers = 1 + max((place_of(layer)[1] for found in history.quantities.values() for layer in found), default=0)
    for row, quantity in enumerate(shown, start=1):
        curves = figure.add_subplot(grid[row, 0], sharex=losses)
        _draw_course(curves, history.quantities[quantity], QUANTITIES[quantity], quantity, colors)
        curves.set_xlabel("step" if row == len(shown) else "")
        _draw_layers(
            figure, figure.add_subplot(grid[row, 1]), latest_values(history, quantity), list(colors), num_layers
        )
    if shown:
        handles = [figure.axes[1].plot([], [], color=color, label=kind)[0] for kind, color in colors.items()]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def _colors(history: History) -> dict[str, Any]:
    """Return kind of linear -> color, in the order in which the model has them."""
    layers = dict.fromkeys(layer for found in history.quantities.values() for layer in found)
    kinds = list(dict.fromkeys(place_of(layer)[0] for layer in layers))
    return {kind: colormaps["tab10"](i % 10) for i, kind in enumerate(kinds)}


def _draw_losses(axis: Any, history: History) -> None:
    for name, series, style in (("loss", history.losses, "-"), ("eval loss", history.eval_losses, "o-")):
        if series:
            steps, values = zip(*series, strict=True)
            axis.plot(steps, values, style, label=f"{name}, last {values[-1]:.4f}", linewidth=1.3, markersize=4)
    for i, step in enumerate(history.turned):
        axis.axvline(step, color="0.6", linestyle=":", label=None if i else "rotations changed")
    axis.set_title("loss, nats per token", fontsize=10, loc="left")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _draw_course(axis: Any, layers: dict[str, Series], name: str, quantity: str, colors: dict[str, Any]) -> None:
    """Draw the mean over the layers of each kind that were measured at a step: the layers take turns."""
    for kind, color in colors.items():
        at_step: dict[int, list[float]] = {}
        for layer, series in layers.items():
            if place_of(layer)[0] == kind:
                for step, value in series:
                    at_step.setdefault(step, []).append(value)
        steps = sorted(at_step)
        axis.plot(
            steps, [float(np.mean(at_step[step])) for step in steps], ".-", color=color, linewidth=1, markersize=4
        )
    axis.set_title(f"{name} ({quantity}), mean by kind", fontsize=10, loc="left")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _draw_layers(figure: Figure, axis: Any, latest: dict[str, float], kinds: list[str], num_layers: int) -> None:
    values = np.full((len(kinds), num_layers), np.nan)
    for layer, value in latest.items():
        kind, depth = place_of(layer)
        values[kinds.index(kind), depth] = value
    image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
    axis.set_facecolor(_UNMEASURED)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=7)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title("each layer when last measured, by depth (grey: not yet)", fontsize=10, loc="left")
    figure.colorbar(image, ax=axis, pad=0.01)
