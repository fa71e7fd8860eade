"""Regularizers, by the name a recipe uses."""

from qaft.regularizers.base import Regularizer

REGULARIZERS: dict[str, type[Regularizer]] = {}
