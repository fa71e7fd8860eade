"""What a model does to activations while it runs: online rotations, quantized inputs, a quantized KV cache.

The fused half of R4 is in the weights already (R3 has none); this puts the other halves in.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from qaft.arch.base import Arch
from qaft.bases.affine import AffineBase
from qaft.bases.base import FrozenLinear
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.attach import adapted_layers, frozen_layers
from qaft.layers.inputs import LayerInput, put_before
from qaft.models.attention import AttentionInputs, put_into_attention
from qaft.rotation.choice import Choice
from qaft.rotation.places import attention_rotation, down_rotation


def put_online(
    model: PreTrainedModel,
    arch: Arch,
    choice: Choice | None,
    *,
    rotation: str = "hadamard",
    inputs: nn.Module | None = None,
    cache: nn.Module | None = None,
) -> None:
    """Put online rotations and quantizers of activations into a model whose linear layers are frozen or adapted.

    Args:
        model: with the fused parts of ``choice`` in its weights.
        arch: its names and sizes.
        choice: which rotations are in use; None for none.
        rotation: a key of ``ROTATIONS``.
        inputs: fake quantizer of the inputs of linears in integers, see ``quantize_inputs``, or None.
        cache: fake quantizer of keys (after RoPE) and values, or None.

    Raises:
        ModelError: the attention function of the model cannot be wrapped, or a width has no such rotation.
    """
    choice = choice or Choice.uniform(arch.num_layers, residual=False, values=False)
    r4 = down_rotation(arch, rotation=rotation) if any(choice.down) else None
    rotated = {down for (_, down), used in zip(arch.up_downs(), choice.down, strict=True) if used}
    quantize_inputs(model, inputs, rotated=rotated, rotation=r4)
    r3 = attention_rotation(arch, rotation=rotation) if any(choice.attention) else None
    parts = {
        name: AttentionInputs(rotation=r3 if used else None, key=cache, value=cache)
        for name, used in zip(arch.attentions(), choice.attention, strict=True)
        if used or cache is not None
    }
    if parts:
        put_into_attention(model, parts)


def quantize_inputs(
    model: nn.Module, quantizer: nn.Module | None, *, rotated: set[str] | None = None, rotation: nn.Module | None = None
) -> None:
    """Put ``quantizer`` before the linears that servers run in integers, and ``rotation`` before those in ``rotated``.

    These are the trained layers with a grid and the frozen ones in packed integers. Code books (bitsandbytes) are
    multiplied in 16 bits everywhere, so their inputs stay in 16 bits too.
    """
    layers: dict[str, AdaptedLinear | FrozenLinear] = {**adapted_layers(model), **frozen_layers(model)}
    for name, layer in layers.items():
        before = rotation if name in (rotated or ()) else None
        after = quantizer if _is_integer(layer) else None
        if before is not None or after is not None:
            put_before(layer, LayerInput(rotation=before, quantizer=after))


def _is_integer(layer: AdaptedLinear | FrozenLinear) -> bool:
    return layer.quantizer is not None if isinstance(layer, AdaptedLinear) else isinstance(layer, AffineBase)
