"""Scalings of channels folded into a packed model: another merge, in which no weight is quantized again.

    W = diag(1 + a) W0 diag(1 + b)                                              (ssb; ssl: a = 0, ia3: b = 0)

    a   into the scales of the rows of W0: the codes stay
    b   of the layers that read one norm, if they share it:  gamma (1 + b)  (and beta (1 + b))
        of attention's output projection:  rows of the values, and their bias
        of an MLP's down projection:       rows of up, and their bias

The values and up are multiplied by what does not depend on them, so a scaling of their channels passes through. With
grouped query heads one value channel serves several channels of the output projection, whose b are not one factor.

Each scale and each norm weight is rounded once to the dtype in which it is stored; nothing else differs.

Source: See Further for PEFT (arXiv 2407.05417) for ssl and ssb; IA3 (arXiv 2205.05638).
Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from qaft.arch import arch_of
from qaft.arch.base import Arch
from qaft.bases.base import FrozenLinear
from qaft.bases.dense import DenseBase
from qaft.bases.row_scaled import scales_of_rows
from qaft.errors import ExportError
from qaft.export.base import Linear
from qaft.export.tensors import linear_layers
from qaft.layers.adapted import AdaptedLinear

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel

_INSTEAD = "set update.tie to true (kind ssb), or leave the layer out of select.targets, or export `merged`"


@dataclass(frozen=True)
class Fold:
    """Where scalings go: module path -> change d of a factor 1 + d, [O] of linears, [hidden] of norms.

    Attributes:
        outputs: of a layer's own rows, not of its bias.
        passed: of rows and bias, from the layer that reads them.
        norms: of what a norm multiplies its input by.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    passed: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)


def is_scaling(loaded: LoadedModel) -> bool:
    """Return whether the model is packed and its updates, trained without a grid, only scale channels."""
    adapted = [layer for layer in linear_layers(loaded.model).values() if isinstance(layer, AdaptedLinear)]
    packed = any(not isinstance(layer.base, DenseBase) for layer in adapted)
    return packed and all(layer.quantizer is None and layer.update.channel_changes() is not None for layer in adapted)


def plan_fold(loaded: LoadedModel) -> Fold:
    """Return where every scaling of the model goes; that is known before training.

    Raises:
        ExportError: one has no place; the message says why and what to do.
        ModelError: inputs are scaled and the architecture is not known.
    """
    layers = linear_layers(loaded.model)
    fold = Fold()
    for name, layer in layers.items():
        if not isinstance(layer, AdaptedLinear):
            continue
        changes = layer.update.channel_changes()
        assert changes is not None
        if changes.outputs is not None:
            fold.outputs[name] = changes.outputs
        if changes.inputs is not None:
            _place_inputs(name, changes.inputs, fold, layers, arch_of(loaded.source.config))
    try:
        for name in {**fold.outputs, **fold.passed}:
            scales_of_rows(base_of(layers[name]), name)
    except ValueError as error:
        raise ExportError(f"{error}; export `merged` or set model.storage to int4 or int8") from error
    return fold


def _place_inputs(name: str, change: Tensor, fold: Fold, layers: Mapping[str, Linear], arch: Arch) -> None:
    for norm, readers in arch.readers():
        if name in readers:
            _require_shared(name, change, norm, readers, layers)
            fold.norms[norm] = change
            return
    for value, output in arch.value_outputs():
        if name == output and value in layers:
            if arch.num_heads != arch.num_kv_heads:
                raise ExportError(
                    f"{name}: its scaling of inputs cannot be folded: {arch.num_heads} query heads share "
                    f"{arch.num_kv_heads} value heads; {_INSTEAD}"
                )
            heads, turned = arch.value_heads()
            fold.passed[value] = _on_rows(change, layers[value], heads, turned)
            return
    for up, down in arch.up_downs():
        if name == down and up in layers:
            rows, linear = arch.up_rows()
            if not len(linear):
                raise ExportError(
                    f"{name}: its scaling of inputs cannot be folded: an activation stands between {up} and it; "
                    f"{_INSTEAD}"
                )
            fold.passed[up] = _on_rows(change, layers[up], rows, linear)
            return
    raise ExportError(f"{name}: nothing known is before it that could take up its scaling of inputs; {_INSTEAD}")


def _require_shared(
    name: str, change: Tensor, norm: str, readers: tuple[str, ...], layers: Mapping[str, Linear]
) -> None:
    for reader in readers:
        layer = layers.get(reader)
        changes = layer.update.channel_changes() if isinstance(layer, AdaptedLinear) else None
        if changes is None or changes.inputs is not change:
            raise ExportError(
                f"{name}: its scaling of inputs cannot be folded into {norm}, which {reader} reads without it; "
                f"{_INSTEAD}"
            )


def _on_rows(change: Tensor, layer: Linear, blocks: int, changed: range) -> Tensor:
    """Return the change of all rows of a layer, of which these of ``blocks`` are changed, [O]."""
    rows = change.new_zeros(blocks, layer.out_features // blocks)
    rows[changed.start : changed.stop : changed.step] = change.detach().view(len(changed), -1)
    return rows.flatten()


def base_of(layer: Linear) -> FrozenLinear:
    """Return the frozen weight of a linear layer."""
    return layer.base if isinstance(layer, AdaptedLinear) else layer
