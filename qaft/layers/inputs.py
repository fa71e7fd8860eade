"""What happens to a linear layer's input while the model runs: an online rotation, then a quantizer.

The weight is in the rotated basis already (its inverse rotation is fused), so a trained and a frozen layer are treated
alike: x -> quantizer(x R) in front of whatever multiplies.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_CHILD = "inputs"


class LayerInput(nn.Module):
    """``x -> quantizer(rotation(x))``.

    Args:
        rotation: of the last axis, or None.
        quantizer: a fake quantizer of activations with a straight-through gradient, or None.
    """

    def __init__(self, *, rotation: nn.Module | None = None, quantizer: nn.Module | None = None) -> None:
        super().__init__()
        self.rotation = rotation
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer multiplies, in the shape of x."""
        x = x if self.rotation is None else self.rotation(x)
        return x if self.quantizer is None else self.quantizer(x)


def put_before(layer: nn.Module, inputs: LayerInput) -> None:
    """Let every input of ``layer`` pass through ``inputs``, which becomes its child: it moves with it and is printed.

    Raises:
        ValueError: the layer has such a child already.
    """
    if input_of(layer) is not None:
        raise ValueError(f"the inputs of this {type(layer).__name__} are transformed already")
    layer.add_module(_CHILD, inputs)
    layer.register_forward_pre_hook(_through_inputs)


def input_of(layer: nn.Module) -> LayerInput | None:
    """Return what the inputs of ``layer`` pass through, or None."""
    child = layer._modules.get(_CHILD)
    return child if isinstance(child, LayerInput) else None


def _through_inputs(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    inputs = input_of(layer)
    assert inputs is not None
    return (inputs(args[0]), *args[1:])
