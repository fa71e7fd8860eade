"""A checkpoint as a frozen model, streamed: read one tensor, rotate it, quantize it, drop it.

Host memory peaks at the packed model plus a few copies of the largest tensor; the dense model never exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qaft.arch import arch_of
from qaft.layers.attach import replace_module
from qaft.models.heap import release_freed_memory
from qaft.models.layers import LayerBuilder
from qaft.models.reading import ModelReader
from qaft.models.skeleton import block_linears, empty_model, initialize_buffers, linear_names, mark_initialized
from qaft.models.source import CheckpointSource, load_tokenizer, open_source
from qaft.quant.base import Quantizer
from qaft.recipe import ModelSection, QatSection
from qaft.rotation.fuse import Fusion

__all__ = ["LoadedModel", "linear_names", "load_model"]


@dataclass
class LoadedModel:
    """A frozen model and what is needed to write it back.

    Attributes:
        model: in evaluation mode; linear layers of the blocks are ``FrozenLinear``, everything else is in ``dtype``.
        tokenizer: the checkpoint's.
        fusion: the rotation that is folded into the weights, or None.
        norms: the original norm weights, needed to undo the fusion.
        source: the checkpoint.
        frozen_quantizer: the grid of packed ``int4`` and ``int8_group`` layers, or None.
        tied: whether the checkpoint ties embedding and head; a fused model has its own head all the same.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fusion: Fusion | None
    norms: dict[str, Tensor]
    source: CheckpointSource
    frozen_quantizer: Quantizer | None
    tied: bool


def _no_layer(name: str) -> bool:
    return False


def load_model(
    section: ModelSection,
    *,
    qat: QatSection | None,
    latent: Callable[[str], bool] = _no_layer,
    adapted: Callable[[str], bool] = _no_layer,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LoadedModel:
    """Return the model of ``section``, rotated first and quantized after.

    Args:
        section: which checkpoint, and how frozen layers are stored.
        qat: the grid and rotation that adapted layers are trained through, or None.
        latent: module paths that are trained through the grid of ``qat``; they are kept in 16 bits, off that grid.
        adapted: module paths that are trained in any way; their block scales are never quantized.
        device: where the model is built; tensors are moved before they are rotated.
        seed: of the dither of latents that lie on their own grid.

    Raises:
        ModelError: the checkpoint cannot be read, lacks a parameter, or does not fit the grid or the rotation.
        RecipeError: an impossible choice of storage.
    """
    device = torch.device(device)
    dtype: torch.dtype = getattr(torch, section.dtype)
    builder = LayerBuilder(section, qat, latent=latent, adapted=adapted, seed=seed)
    source = open_source(
        section.name, revision=section.revision, dtype=dtype, trust_remote_code=section.trust_remote_code
    )
    tokenizer = load_tokenizer(source)
    model = empty_model(
        source.config, dtype=dtype, attention=section.attention, trust_remote_code=section.trust_remote_code
    )
    linears = block_linears(model)
    builder.check_groups(linears)
    reader = ModelReader(source, model, _fusion(source, qat), device)
    _fill(model, reader, builder, linears, device)
    _tie(model, reader)
    initialize_buffers(model, device)
    _finish(model, source)
    builder.report()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        fusion=reader.fusion,
        norms=reader.norms,
        source=source,
        frozen_quantizer=builder.frozen_quantizer,
        tied=reader.tied,
    )


def _fusion(source: CheckpointSource, qat: QatSection | None) -> Fusion | None:
    if qat is None or qat.rotation == "none":
        return None
    return Fusion(arch_of(source.config), rotation=qat.rotation, seed=qat.rotation_seed)


@torch.no_grad()
def _fill(
    model: PreTrainedModel,
    reader: ModelReader,
    builder: LayerBuilder,
    linears: dict[str, nn.Linear],
    device: torch.device,
) -> None:
    """Replace the model's meta tensors by the checkpoint's, and its linear layers by frozen ones."""
    for name in reader.names():
        module, _, leaf = name.rpartition(".")
        if module not in linears:
            owner = model.get_submodule(module)
            like = getattr(owner, leaf)
            _set_tensor(owner, leaf, reader.read(name, like).to(device, like.dtype))
        elif leaf == "weight":
            linear = linears[module]
            bias = None if linear.bias is None else reader.read(f"{module}.bias", linear.bias)
            frozen = builder.build(module, reader.read(name, linear.weight), bias)
            mark_initialized(frozen)
            replace_module(model, module, frozen)
            release_freed_memory()


def _set_tensor(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in owner._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(owner, leaf, tensor)
    mark_initialized(tensor)


def _tie(model: PreTrainedModel, reader: ModelReader) -> None:
    """Share the parameters that the checkpoint shares; where it shares none any more, say so in the config."""
    for target, origin in reader.ties.items():
        module, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(origin))
    if not reader.ties:
        model.config.get_text_config().tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def _finish(model: PreTrainedModel, source: CheckpointSource) -> None:
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    model.config._name_or_path = source.name
