"""Put adapted layers into a model, find them, and read their trainables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from qaft.bases.base import FrozenLinear
from qaft.errors import TargetError
from qaft.layers.adapted import AdaptedLinear


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule at the dotted path ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def attach(
    model: nn.Module, names: Iterable[str], adapt: Callable[[str, FrozenLinear], AdaptedLinear]
) -> dict[str, AdaptedLinear]:
    """Replace each named frozen layer by ``adapt(name, layer)`` and freeze everything else.

    Returns:
        name -> layer, in the order of ``names``.

    Raises:
        TargetError: a name is not a frozen linear layer.
    """
    model.requires_grad_(False)
    layers: dict[str, AdaptedLinear] = {}
    for name in names:
        base = model.get_submodule(name)
        if not isinstance(base, FrozenLinear):
            raise TargetError(f"{name}: {type(base).__name__} cannot be adapted; only linear layers of the blocks can")
        layers[name] = adapt(name, base)
        replace_module(model, name, layers[name])
    return layers


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the trained layers by module path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def frozen_layers(model: nn.Module) -> dict[str, FrozenLinear]:
    """Return the frozen linear layers that are not inside an adapted one, by module path."""
    inside = {f"{name}.base" for name in adapted_layers(model)}
    return {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear) and n not in inside}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def update_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers of updates, by name: choices like the trained rows, without which trained
    parameters mean nothing.
    """
    buffers: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model).items():
        persistent = layer.update.state_dict().keys()
        buffers |= {f"{name}.update.{leaf}": b for leaf, b in layer.update.named_buffers() if leaf in persistent}
    return buffers


def load_trainables(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy what a checkpoint holds into the model: the trained parameters and the buffers of updates.

    Raises:
        TargetError: names or shapes differ from the model's.
    """
    targets = {**trainable_parameters(model), **update_buffers(model)}
    if missing := sorted(targets.keys() ^ tensors.keys()):
        raise TargetError(
            f"saved trainables do not fit this model: {len(missing)} names differ, first {missing[0]!r}; "
            "use the recipe that the run was trained with"
        )
    for name, target in targets.items():
        if target.shape != tensors[name].shape:
            raise TargetError(f"{name}: saved shape {tuple(tensors[name].shape)}, model has {tuple(target.shape)}")
        with torch.no_grad():
            target.copy_(tensors[name])
