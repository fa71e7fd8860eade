"""Layer selectors, by the name a recipe uses."""

from qaft.selection.base import LayerSelector
from qaft.selection.patterns import Patterns

SELECTORS: dict[str, type[LayerSelector]] = {
    "patterns": Patterns,
}
