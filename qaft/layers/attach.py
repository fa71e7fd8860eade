"""Put adapted layers into a model, find them, and read their trainables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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


def load_trainables(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved trainables into the model.

    Raises:
        TargetError: names or shapes differ from the model's trainables.
    """
    parameters = trainable_parameters(model)
    if missing := sorted(parameters.keys() ^ tensors.keys()):
        raise TargetError(
            f"saved trainables do not fit this model: {len(missing)} names differ, first {missing[0]!r}; "
            "use the recipe that the run was trained with"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise TargetError(f"{name}: saved shape {tuple(tensors[name].shape)}, model has {tuple(parameter.shape)}")
        parameter.data.copy_(tensors[name])
