"""The heat map of ``qaft rotate``: the error of every linear of every layer without and with rotations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure

from qaft.rotations import Measured

SMALLEST = 1e-8
"""Errors below this are drawn as this: a layer in 16 bits has none."""


def draw_errors(measured: Measured, path: Path) -> tuple[Path, Path]:
    """Write the heat map as ``path`` (PNG) and beside it as SVG; return both paths."""
    names, plain, turned = _matrices(measured)
    ratio = np.log2(turned / plain)
    width = max(6.0, 0.28 * plain.shape[1] + 3.0)
    figure = Figure(figsize=(width, 3 * (0.32 * len(names) + 0.9)), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    shared = LogNorm(min(plain.min(), turned.min()), max(plain.max(), turned.max()) * (1 + 1e-6))
    _panel(figure, axes[0], plain, names, "without rotation: relative output error", norm=shared, cmap="viridis")
    _panel(figure, axes[1], turned, names, "with every available rotation", norm=shared, cmap="viridis")
    limit = max(float(np.abs(ratio).max()), 0.1)
    norm = TwoSlopeNorm(0.0, -limit, limit)
    title = "log2(with / without), dots: rotations in use"
    _panel(figure, axes[2], ratio, names, title, norm=norm, cmap="RdBu_r")
    _mark_chosen(axes[2], measured, names)
    axes[2].set_xlabel("decoder layer")
    vector = path.with_suffix(".svg")
    for file in (path, vector):
        figure.savefig(file, dpi=150)
    return path, vector


def _matrices(measured: Measured) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the linears' short names, and their errors without and with all rotations, [linears, layers]."""
    first = measured.layers[0]
    names = [name.rpartition(".")[2] for name in first.linears]
    plain = [[e[False, False].delta_y for e in layer.linears.values()] for layer in measured.layers]
    turned = [[e[max(e)].delta_y for e in layer.linears.values()] for layer in measured.layers]
    for label, pair in (("keys (cache)", first.keys), ("values (cache)", first.values)):
        if pair is not None:
            names.append(label)
    for i, layer in enumerate(measured.layers):
        for pair in (layer.keys, layer.values):
            if pair is not None:
                plain[i].append(pair[0])
                turned[i].append(pair[1])
    return names, np.maximum(np.array(plain).T, SMALLEST), np.maximum(np.array(turned).T, SMALLEST)


def _panel(figure: Figure, axis: Any, values: np.ndarray, names: list[str], title: str, **style: Any) -> None:
    image = axis.imshow(values, aspect="auto", interpolation="nearest", **style)
    axis.set_yticks(range(len(names)), names)
    step = max(1, values.shape[1] // 16)
    axis.set_xticks(range(0, values.shape[1], step))
    axis.set_title(title, fontsize=10, loc="left")
    figure.colorbar(image, ax=axis, pad=0.01)


def _mark_chosen(axis: Any, measured: Measured, names: list[str]) -> None:
    """Put a dot on every linear that meets a rotation in use."""
    choice = measured.choice
    for i, layer in enumerate(measured.layers):
        for row, met in enumerate(layer.beside.values()):
            if choice.residual or (met and getattr(choice, met)[i]):
                axis.plot(i, row, "k.", markersize=3)
        for label, used in (("keys (cache)", choice.attention[i]), ("values (cache)", choice.values[i])):
            if used and label in names:
                axis.plot(i, names.index(label), "k.", markersize=3)
