"""Layers by name. QV-only fine-tuning (arXiv 2410.02247) is ``targets: [q_proj, v_proj]`` and a learning-rate ratio."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from qaft.errors import TargetError


def match_names(pattern: str, names: Sequence[str]) -> tuple[str, ...]:
    r"""Return the names in which the regular expression ``pattern`` matches whole parts: ``layers\.[0-3]\..*q_proj``.

    Raises:
        TargetError: the pattern is no regular expression.
    """
    try:
        # Path parts are whole words: q_proj must not match my_q_proj_extra.
        expression = re.compile(rf"(?:^|\.)(?:{pattern})(?:$|\.)")
    except re.error as error:
        raise TargetError(f"pattern {pattern!r} is no regular expression: {error}") from error
    return tuple(n for n in names if expression.search(n))


class Patterns:
    """Selects the layers whose name matches any of the patterns and lies in the chosen blocks.

    Args:
        targets: regular expressions on whole parts of the module path; ``all`` selects every linear of the blocks.
        layers: block numbers to keep, ``[first, last]`` inclusive; None for all.
    """

    def __init__(self, *, targets: Sequence[str] = ("q_proj", "v_proj"), layers: Sequence[int] | None = None) -> None:
        if isinstance(targets, str):
            targets = [targets]
        if not targets:
            raise ValueError("targets=[] selects nothing; name layers such as q_proj, v_proj, or all")
        if layers is not None and len(layers) != 2:
            raise ValueError(f"layers={list(layers)} must be [first, last]")
        self.targets = tuple(targets)
        self.layers = None if layers is None else range(layers[0], layers[1] + 1)

    def __call__(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the matching names.

        Raises:
            TargetError: a pattern matches nothing; the message lists near names.
        """
        chosen: set[str] = set()
        for target in self.targets:
            found = tuple(names) if target == "all" else match_names(target, names)
            if not found:
                leaves = sorted({n.rpartition(".")[2] for n in names})
                near = difflib.get_close_matches(target, leaves, n=3, cutoff=0.4) or leaves
                raise TargetError(f"select.targets: {target!r} matches no linear layer; near names: {', '.join(near)}")
            chosen.update(n for n in found if self._in_layers(n))
        if not chosen:
            raise TargetError(f"select.layers: no target lies in blocks {list(self.layers or ())}")
        return tuple(n for n in names if n in chosen)

    def _in_layers(self, name: str) -> bool:
        if self.layers is None:
            return True
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        return number in self.layers
