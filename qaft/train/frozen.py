"""Frozen parameters as buffers, for an engine that takes every parameter of a module for its own."""

from __future__ import annotations

from torch import nn

Hidden = list[tuple[nn.Module, str, nn.Parameter]]
"""Frozen parameters with the modules and names that they had."""


def hide_frozen(module: nn.Module) -> Hidden:
    """Turn frozen parameters into buffers and return where they were; names and values stay the same."""
    hidden = [
        (owner, name, param)
        for owner in module.modules()
        for name, param in owner._parameters.items()
        if param is not None and not param.requires_grad
    ]
    for owner, name, param in hidden:
        del owner._parameters[name]
        owner.register_buffer(name, param.detach())
    return hidden


def show_frozen(hidden: Hidden) -> None:
    """Undo ``hide_frozen``."""
    for owner, name, param in hidden:
        del owner._buffers[name]
        owner._parameters[name] = param
