"""Bytes that training holds on each process, from shapes alone: no weight is read.

    T = bytes of the trained parameters, A = bytes of the optimizer's state, N = processes

                     parameters    gradients    optimizer    on the host
    one process, 0   T             T            A
    1                T + T/N       T            A/N
    2                T + T/N       T/N          A/N
    2, offload       T                                       4 T/N + A/N
    3                2 T/N         T/N          A/N
    3, offload                                               4 T/N + A/N

ZeRO steps fp32 parts of its own (T/N) beside the parameters, and an offload moves them to the host with gradients,
state and copies for the transfer. The packed base is whole on every process in every stage. Not counted: activations,
and what passes through: the buckets in which gradients are reduced (at most ``LARGEST_BUCKET`` elements), and at stage
3 the gathered parameters of a layer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qaft.bases.base import LinearSpec
from qaft.bases.sizes import storage_bytes
from qaft.compat.training import PARTITIONABLE
from qaft.models.layers import frozen_quantizer
from qaft.models.skeleton import block_linears, empty_model
from qaft.models.source import config_of
from qaft.recipe import Recipe
from qaft.registry import build_from, lookup
from qaft.selection import SELECTORS
from qaft.ties import shared_readers
from qaft.train.optimizers import STATE_BYTES
from qaft.updates import UPDATES
from qaft.updates.base import Update

ENGINES = ("none", "zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
"""The configurations that a plan compares; ``none`` is training without DeepSpeed."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What a recipe's model holds before it is trained.

    Attributes:
        frozen: bytes of packed layers, embeddings, norms, head, biases and buffers of updates.
        num_trained: trained scalars.
        trained: their bytes.
    """

    frozen: int
    num_trained: int
    trained: int


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one process: four parts on its device, and the rest in host memory."""

    frozen: int
    parameters: int
    gradients: int
    optimizer: int
    host: int

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.frozen + self.parameters + self.gradients + self.optimizer


def footprint(size: ModelSize, engine: str, *, state: int, world_size: int) -> Footprint:
    """Return what one process holds between backward and step; see the table above.

    Args:
        size: of the model.
        engine: one of ``ENGINES``.
        state: bytes of optimizer state per trained scalar.
        world_size: N.
    """
    whole, all_state = size.trained, state * size.num_trained
    part, part_state = -(-whole // world_size), -(-all_state // world_size)
    parameters, gradients, optimizer, host = {
        "none": (whole, whole, all_state, 0),
        "zero0": (whole, whole, all_state, 0),
        "zero1": (whole + part, whole, part_state, 0),
        "zero2": (whole + part, part, part_state, 0),
        "zero2_offload": (whole, 0, 0, 4 * part + part_state),
        "zero3": (2 * part, part, part_state, 0),
        "zero3_offload": (0, 0, 0, 4 * part + part_state),
    }[engine]
    return Footprint(frozen=size.frozen, parameters=parameters, gradients=gradients, optimizer=optimizer, host=host)


def optimizer_state_bytes(recipe: Recipe, engine: str) -> int:
    """Return the bytes of optimizer state per trained scalar; adamw's where the recipe's cannot be partitioned."""
    if engine not in ("none", "zero0") and recipe.optim.name not in PARTITIONABLE:
        return STATE_BYTES["adamw"]
    momentum = recipe.optim.name == "sgd" and recipe.optim.momentum > 0
    return 4 if momentum else STATE_BYTES[recipe.optim.name]


def model_size(recipe: Recipe) -> ModelSize:
    """Return the sizes of a recipe's model; an embedding that a rotation has to untie is counted twice.

    Raises:
        RecipeError: an option is wrong, or a pattern matches no layer.
        ModelError: the checkpoint's configuration cannot be read.
    """
    model = empty_model(
        config_of(recipe.model),
        dtype=getattr(torch, recipe.model.dtype),
        attention="eager",
        trust_remote_code=recipe.model.trust_remote_code,
    )
    linears = block_linears(model)
    selector = build_from(SELECTORS, recipe.select.kind, recipe.select.options, where="select")
    selected = frozenset(selector(tuple(linears)))
    inside = {id(parameter) for linear in linears.values() for parameter in linear.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside] + list(model.buffers())
    frozen = sum(tensor.nbytes for tensor in rest) + _untied_bytes(recipe, model)
    frozen += sum(_layer_bytes(recipe, linear, selected=name in selected) for name, linear in linears.items())
    ties = _ties(recipe, model, selected)
    layers = Counter((linears[name].out_features, linears[name].in_features, ties.get(name)) for name in selected)
    return _with_updates(recipe, frozen, layers)


def _ties(recipe: Recipe, model: Any, selected: frozenset[str]) -> dict[str, bool]:
    """Return, of the layers that share parameters because they read one norm, whether another holds them already."""
    sharing = ([name for name in readers if name in selected] for _, readers in shared_readers(recipe, model.config))
    return {name: name != names[0] for names in sharing for name in names}


def _with_updates(recipe: Recipe, frozen: int, layers: Counter[tuple[int, int, bool | None]]) -> ModelSize:
    """Return the size of a model with ``frozen`` bytes and updates, counted by shape and by ``_ties``."""
    num_trained = trained = 0
    for (out_features, in_features, tie), count in layers.items():
        update = _update(recipe, out_features, in_features, ties=tie is not None)
        held = set()
        if tie:
            first = _update(recipe, out_features, in_features, ties=True)
            update.tie_to(first)
            held = set(first.parameters())
        own = [p for p in update.parameters() if p.requires_grad and p not in held]
        frozen += count * sum(buffer.nbytes for buffer in update.buffers())
        num_trained += count * sum(parameter.numel() for parameter in own)
        trained += count * sum(parameter.nbytes for parameter in own)
    return ModelSize(frozen=frozen, num_trained=num_trained, trained=trained)


def _untied_bytes(recipe: Recipe, model: Any) -> int:
    rotated = recipe.qat is not None and recipe.qat.rotation != "none"
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return embedding.weight.nbytes if rotated and embedding.weight is head.weight else 0


def _layer_bytes(recipe: Recipe, linear: nn.Linear, *, selected: bool) -> int:
    section, dtype = recipe.model, linear.weight.dtype
    bias = 0 if linear.bias is None else linear.out_features * dtype.itemsize
    if selected and recipe.qat is not None:
        # Latents off the grid: more only where a checkpoint lies on that grid already.
        return linear.weight.numel() * dtype.itemsize + bias
    quantizer = frozen_quantizer(section, recipe.qat)
    double = section.double_quant and not selected
    shape = (linear.out_features, linear.in_features)
    return storage_bytes(section.storage, *shape, quantizer=quantizer, double_quant=double) + bias


def _update(recipe: Recipe, out_features: int, in_features: int, *, ties: bool) -> Update:
    """Return an update of a layer of that shape, which with ``ties`` reads a norm: all that its size depends on."""
    choice = lookup(UPDATES, recipe.update.kind, where="update").entry_choice(**recipe.update.options)
    spec = LinearSpec(
        name=f"select: a layer of [{out_features}, {in_features}]",
        out_features=out_features,
        in_features=in_features,
        dtype=getattr(torch, recipe.train.param_dtype),
        row_scores=torch.zeros(out_features),
        column_scores=torch.zeros(in_features),
        reads="norm" if ties else None,
        places=None if choice is None else choice.first(out_features * in_features),
    )
    return build_from(UPDATES, recipe.update.kind, recipe.update.options, spec, where="update")
