"""What a loaded model is made of, by checkpoint names in the order of its modules: linear layers and all else."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qaft.bases.base import FrozenLinear
from qaft.bases.dense import DenseBase
from qaft.errors import ExportError, RecipeError
from qaft.export.base import Linear
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.inputs import input_of

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel
    from qaft.sections import ExportSection

HEAD = "lm_head"


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Return the trained and the frozen linear layers by module path, in the order of the model."""
    return {name: part for name, part in _walk(model, "") if not isinstance(part, Tensor)}


def model_parts(model: nn.Module) -> Iterator[tuple[str, Linear | Tensor]]:
    """Yield (module path, layer) for linear layers, and (checkpoint name, tensor) for everything else that is saved.

    A tensor that is shared (tied embeddings) is yielded once, under its first name.
    """
    seen: set[int] = set()
    for name, part in _walk(model, ""):
        if id(part) not in seen:
            seen.add(id(part))
            yield name, part


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, Linear | Tensor]]:
    if isinstance(module, (AdaptedLinear, FrozenLinear)):
        yield name, module
        return
    prefix = f"{name}." if name else ""
    for leaf, parameter in module.named_parameters(recurse=False):
        yield prefix + leaf, parameter
    for leaf, buffer in module.named_buffers(recurse=False):
        if leaf not in module._non_persistent_buffers_set:
            yield prefix + leaf, buffer
    for child_name, child in module.named_children():
        yield from _walk(child, prefix + child_name)


def dense_linears(model: nn.Module, packed: Container[str]) -> list[str]:
    """Return the linear layers that are not ``packed``, as a reader names them; the head is one also where it is tied.

    Args:
        model: the live model.
        packed: module paths.
    """
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or m is head]
    return [*dict.fromkeys([*(n for n in linear_layers(model) if n not in packed), *names])]


def model_dtype(loaded: LoadedModel) -> torch.dtype:
    """Return the dtype that the model computes in."""
    return next(loaded.model.get_input_embeddings().parameters()).dtype


def merged_weight(layer: Linear, dtype: torch.dtype) -> Tensor:
    """Return the effective weight of a layer in ``dtype``, [O, I].

    In the dtype of the model this is ``AdaptedLinear.weight()`` or ``FrozenLinear.dequantize()`` bit for bit. In a
    wider one a grid's values are what the forward uses, and an adapter's merge is not rounded at all.
    """
    if isinstance(layer, FrozenLinear):
        return layer.dequantize().to(layer.dtype).to(dtype)
    with torch.no_grad():
        return (layer.weight() if layer.quantizer is not None else layer.latent()).to(dtype)


def is_exact(layer: Linear, dtype: torch.dtype) -> bool:
    """Return whether the layer computes, in fp32, with exactly ``merged_weight(layer, dtype)``."""
    if isinstance(layer, AdaptedLinear) and layer.quantizer is None:
        # An adapter adds two products; only their merge in fp32 is not rounded.
        return dtype == torch.float32
    if isinstance(layer, DenseBase) and layer.weight.dtype != layer.dtype:
        return False
    return dtype in (layer.dtype, torch.float32)


def is_tied(model: nn.Module) -> bool:
    """Return whether embedding and head are one tensor in the live model."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    return head is not None and getattr(head, "weight", None) is embedding.weight  # pyright: ignore


def require_plain_options(section: ExportSection) -> None:
    """Refuse options of ``merged`` for a format that stores what was trained as it is.

    Raises:
        RecipeError: dtype or basis is set.
    """
    basis = section.basis if section.basis != "fused" else None
    dtype = section.dtype if section.format != "gguf" else None
    for key, wanted, formats in (("dtype", dtype, "formats merged and gguf"), ("basis", basis, "format merged")):
        if wanted is not None:
            raise RecipeError(
                f"export.{key}={wanted!r} applies to {formats} only; leave it out for {section.format}, which "
                "stores what was trained as it is"
            )


def require_portable(layers: dict[str, Linear]) -> None:
    """Refuse layers whose function is more than a weight and a bias.

    Raises:
        ExportError: an online rotation or an activation quantizer, which no plain checkpoint can hold.
    """
    for name, layer in layers.items():
        before = input_of(layer)
        rotated = before is not None and before.rotation is not None
        if rotated or (isinstance(layer, AdaptedLinear) and not isinstance(layer.rotation, nn.Identity)):
            raise ExportError(
                f"{name}: has an online rotation, which transformers would not apply; train with qat.target portable"
            )
        if isinstance(layer, AdaptedLinear) and not isinstance(layer.act_quantizer, nn.Identity):
            raise ExportError(
                f"{name}: quantizes its input, which a weight-only checkpoint would not; train without it"
            )
