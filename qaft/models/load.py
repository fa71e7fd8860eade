"""A checkpoint as a frozen model, streamed: read one tensor, rotate it, quantize it, drop it.

Host memory peaks at the packed model plus a few copies of the largest tensor; the dense model never exists. With
``share`` only the first of several processes reads; see ``sharing.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qaft.arch import arch_of
from qaft.bases.base import FrozenLinear
from qaft.layers.attach import replace_module
from qaft.models.heap import release_freed_memory
from qaft.models.layers import LayerBuilder
from qaft.models.reading import ModelReader
from qaft.models.sharing import Sharing, shared_source
from qaft.models.skeleton import block_linears, empty_model, initialize_buffers, linear_names, mark_initialized
from qaft.models.source import CheckpointSource, load_tokenizer
from qaft.quant.base import Quantizer
from qaft.rotation import rotation_kind
from qaft.rotation.choice import Choice
from qaft.rotation.fuse import Fusion
from qaft.sections import ModelSection, QatSection

__all__ = ["LoadedModel", "linear_names", "load_model"]


@dataclass
class LoadedModel:
    """A frozen model and what is needed to write it back.

    Attributes:
        model: in evaluation mode; linear layers of the blocks are ``FrozenLinear``, everything else is in ``dtype``.
        tokenizer: the checkpoint's.
        fusion: the rotation that is folded into the weights, or None.
        originals: every parameter as the checkpoint has it, by its name in the model, read when it is asked for. A
            rank that received the model holds the norms that were folded, and nothing else.
        source: the checkpoint.
        frozen_quantizer: the grid of packed ``int4`` and ``int8_group`` layers, or None.
        tied: whether the checkpoint ties embedding and head; a fused model has its own head all the same.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fusion: Fusion | None
    originals: Mapping[str, Tensor]
    source: CheckpointSource
    frozen_quantizer: Quantizer | None
    tied: bool


def _no_layer(name: str) -> bool:
    return False


def load_model(
    section: ModelSection,
    *,
    qat: QatSection | None,
    source: CheckpointSource | None = None,
    choice: Choice | None = None,
    latent: Callable[[str], bool] = _no_layer,
    adapted: Callable[[str], bool] = _no_layer,
    device: torch.device | str = "cpu",
    seed: int = 0,
    share: bool = False,
) -> LoadedModel:
    """Return the model of ``section``, rotated first and quantized after.

    Args:
        section: which checkpoint, and how frozen layers are stored.
        qat: the grid and rotation that adapted layers are trained through, or None.
        source: the checkpoint of ``section``, when the caller has opened it already.
        choice: which rotations to fold in; None for R1 and every R2, or none where ``qat`` says so.
        latent: module paths that are trained through the grid of ``qat``; they are kept in 16 bits, off that grid.
        adapted: module paths that are trained in any way; their block scales are never quantized.
        device: where the model is built; tensors are moved before they are rotated.
        seed: of the dither of latents that lie on their own grid.
        share: rank 0 of the job reads and quantizes, the others receive; collective.

    Raises:
        ModelError: the checkpoint cannot be read, lacks a parameter, or does not fit the grid or the rotation.
        RecipeError: an impossible choice of storage.
    """
    device = torch.device(device)
    dtype: torch.dtype = getattr(torch, section.dtype)
    builder = LayerBuilder(section, qat, latent=latent, adapted=adapted, seed=seed)
    sharing = Sharing(device, active=share)
    source = source or shared_source(section, sharing)
    tokenizer = load_tokenizer(source)
    model = empty_model(
        source.config, dtype=dtype, attention=section.attention, trust_remote_code=section.trust_remote_code
    )
    linears = block_linears(model)
    builder.check_groups(linears)
    fusion = _fusion(source, qat, choice)
    maker = _Maker(lambda: ModelReader(source, model, fusion, device), builder, linears)
    contents = sharing.value(maker.contents)
    _fill(model, contents.names, maker, sharing)
    _tie(model, contents.ties)
    initialize_buffers(model, device)
    _finish(model, source)
    builder.report()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        fusion=fusion,
        originals=maker.reader.originals if sharing.reads else contents.norms,
        source=source,
        frozen_quantizer=builder.frozen_quantizer,
        tied=contents.tied,
    )


def _fusion(source: CheckpointSource, qat: QatSection | None, choice: Choice | None) -> Fusion | None:
    if qat is None or qat.rotation == "none":
        return None
    kind = rotation_kind(qat.rotation)
    return Fusion(arch_of(source.config), choice, rotation=kind, seed=qat.rotation_seed)


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """What every rank has to know of the checkpoint; see ``ModelReader`` for the attributes."""

    names: list[str]
    ties: dict[str, str]
    tied: bool
    norms: dict[str, Tensor]


class _Maker:
    """Makes the parts of the model out of the checkpoint, which is opened when the first one is asked for."""

    def __init__(
        self, open_reader: Callable[[], ModelReader], builder: LayerBuilder, linears: Mapping[str, nn.Linear]
    ) -> None:
        self._open_reader = open_reader
        self._builder = builder
        self.linears = linears

    @cached_property
    def reader(self) -> ModelReader:
        """The opened checkpoint."""
        return self._open_reader()

    def contents(self) -> _Contents:
        """Return names, ties and norms."""
        reader = self.reader
        norms = {name: norm.cpu() for name, norm in reader.norms.items()}
        return _Contents(names=reader.names(), ties=dict(reader.ties), tied=reader.tied, norms=norms)

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """Return a tensor that is no weight of a linear layer."""
        return self.reader.read(name, like).to(like.dtype)

    def layer(self, name: str) -> FrozenLinear:
        """Return the frozen layer for the linear layer ``name``."""
        linear = self.linears[name]
        bias = None if linear.bias is None else self.reader.read(f"{name}.bias", linear.bias)
        return self._builder.build(name, self.reader.read(f"{name}.weight", linear.weight), bias)


@torch.no_grad()
def _fill(model: PreTrainedModel, names: list[str], maker: _Maker, sharing: Sharing) -> None:
    """Replace the model's meta tensors by the checkpoint's, and its linear layers by frozen ones."""
    for name in names:
        module, _, leaf = name.rpartition(".")
        if module not in maker.linears:
            owner = model.get_submodule(module)
            _set_tensor(owner, leaf, sharing.tensor(partial(maker.tensor, name, getattr(owner, leaf))))
        elif leaf == "weight":
            frozen = sharing.module(partial(maker.layer, module))
            mark_initialized(frozen)
            replace_module(model, module, frozen)
            release_freed_memory()


def _set_tensor(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in owner._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(owner, leaf, tensor)
    mark_initialized(tensor)


def _tie(model: PreTrainedModel, ties: Mapping[str, str]) -> None:
    """Share the parameters that the checkpoint shares; where it shares none any more, say so in the config."""
    for target, origin in ties.items():
        module, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(origin))
    if not ties:
        model.config.get_text_config().tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def _finish(model: PreTrainedModel, source: CheckpointSource) -> None:
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    model.config._name_or_path = source.name
