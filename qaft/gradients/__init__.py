"""Gradient sources, by the name a recipe uses."""

from qaft.gradients.backprop import Backprop

SOURCES: dict[str, type] = {
    "backprop": Backprop,
}
