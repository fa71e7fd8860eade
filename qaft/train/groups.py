"""Optimizer groups by name: a factor on the learning rate for the parameters of some modules (``v_proj`` at 4 x lr).

Source: arXiv 2410.02247 (eta_V = lambda eta_Q); patterns match modules, never loose substrings, so that a bias or a
norm is not caught by accident.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

from torch import nn

from qaft.errors import RecipeError
from qaft.sections import OptimSection

BASE_GROUP = "base"
"""Name of the group of parameters that no pattern matches."""


def param_groups(named_params: Iterable[tuple[str, nn.Parameter]], section: OptimSection) -> list[dict[str, Any]]:
    """Return torch optimizer groups with ``name``, ``lr`` = ``section.lr`` x factor and ``params``; base group first.

    A pattern is a regular expression that must cover whole dotted components of a parameter's name or of a module that
    holds it: ``v_proj`` and ``v_proj$`` match ``layers.0.self_attn.v_proj.update.down``; ``layers.1`` does not match
    ``layers.10``; ``layers.(1|2)`` and ``.*_proj`` are possible. Empty groups are left out.

    Args:
        named_params: every parameter; those that do not require gradients are passed over.
        section: holds ``lr`` and ``lr_scale`` (pattern -> factor).

    Raises:
        RecipeError: nothing is trainable, a pattern is no regular expression, matches no trainable parameter, or two
            patterns match the same one.
    """
    trainable = {name: param for name, param in named_params if param.requires_grad}
    if not trainable:
        raise RecipeError("no parameter is trainable; check the sections select and update")
    matched_by: dict[str, str] = {}
    for pattern in section.lr_scale:
        for name in _matches(pattern, trainable):
            if name in matched_by:
                raise RecipeError(
                    f"optim.lr_scale: {matched_by[name]!r} and {pattern!r} both match {name}; make them disjoint"
                )
            matched_by[name] = pattern
    factors = {BASE_GROUP: 1.0, **section.lr_scale}
    groups = []
    for group, factor in factors.items():
        params = [param for name, param in trainable.items() if matched_by.get(name, BASE_GROUP) == group]
        if params:
            groups.append({"name": group, "lr": section.lr * factor, "params": params})
    return groups


def _matches(pattern: str, trainable: Mapping[str, nn.Parameter]) -> list[str]:
    try:
        expression = re.compile(rf"(?:^|\.)(?:{pattern})$")
    except re.error as error:
        raise RecipeError(f"optim.lr_scale: {pattern!r} is not a regular expression: {error}") from error
    names = [name for name in trainable if any(expression.search(part) for part in _prefixes(name))]
    if not names:
        raise RecipeError(
            f"optim.lr_scale: {pattern!r} matches no trainable parameter{_near(pattern, trainable)}; "
            "it must cover whole dotted components of a name"
        )
    return names


def _prefixes(name: str) -> Iterable[str]:
    return accumulate(name.split("."), lambda left, right: f"{left}.{right}")


def _near(pattern: str, trainable: Mapping[str, nn.Parameter]) -> str:
    words = sorted({word for name in trainable for word in name.split(".") if not word.isdigit()})
    text = re.sub(r"[^\w.]", "", pattern).split(".")[-1]
    near = difflib.get_close_matches(text, words, n=3, cutoff=0.5) or words[:8]
    return f" (trainable modules near it: {', '.join(near)})"
