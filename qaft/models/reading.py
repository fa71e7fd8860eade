"""The parameters of a model out of a checkpoint: ties resolved, rotation fused, one tensor at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from qaft.errors import ModelError
from qaft.models.source import CheckpointSource
from qaft.rotation.fuse import Fusion

log = logging.getLogger(__name__)

_SHOWN = 8


class _Originals(Mapping[str, Tensor]):
    """The parameters of a checkpoint by their names in the model: some kept, the others read on demand."""

    def __init__(self, kept: Mapping[str, Tensor], names: Mapping[str, str], read: Callable[[str], Tensor]) -> None:
        self._kept = kept
        self._names = names
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._kept[name] if name in self._kept else self._read(name)

    def __contains__(self, name: object) -> bool:
        # Mapping would read the tensor to find out.
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ModelReader:
    """Reads a tensor under the name that it has in the model, in the basis that the model will compute in.

    Args:
        source: the checkpoint.
        model: the empty model; its ties decide which names share a tensor.
        fusion: the rotation to fold in, or None.
        device: where tensors are put, and fused.

    Attributes:
        fusion: as given.
        norms: the original parameters of the norms that the fusion folds away.
        originals: every parameter as the checkpoint has it, read when it is asked for; norms are kept.
        tied: whether head and embedding are one tensor in the checkpoint.
        ties: model name -> the name that it shares its parameter with, in the loaded model.

    Raises:
        ModelError: the checkpoint lacks a parameter of the model, or a shape differs.
    """

    def __init__(
        self, source: CheckpointSource, model: PreTrainedModel, fusion: Fusion | None, device: torch.device
    ) -> None:
        self._source = source
        self.fusion = fusion
        self._device = device
        stored = stored_names(source, model)
        shared = _shared_tensors(source, model, stored)
        self.tied = bool(shared)
        self.ties = {} if fusion is not None and fusion.untied() else shared
        self._origin = _origins(source, model, stored, shared)
        self._position = {name: i for i, name in enumerate(source.names())}
        _report_unexpected(source, model, [name for name in stored if name not in self._origin])
        names = () if fusion is None else fusion.norm_names
        self.norms: dict[str, Tensor] = {name: self._read(name) for name in names}
        self.originals: Mapping[str, Tensor] = _Originals(self.norms, self._origin, self._read)

    def names(self) -> list[str]:
        """Return the model's tensors in the order of the checkpoint's files; tied ones once."""
        return sorted((n for n in self._origin if n not in self.ties), key=lambda n: self._position[self._origin[n]])

    def read(self, name: str, like: Tensor) -> Tensor:
        """Return one tensor: fp32 when it was fused, otherwise in the dtype of the checkpoint.

        Args:
            name: the name in the model.
            like: the model's own tensor, for its shape.

        Raises:
            ModelError: the shape differs from the model's.
        """
        tensor = self._read(name)
        if tensor.shape != like.shape:
            raise ModelError(
                f"{self._source.name}: {name} has shape {list(tensor.shape)}, but its config implies "
                f"{list(like.shape)}; config.json belongs to another checkpoint"
            )
        return tensor if self.fusion is None else self.fusion.forward(name, tensor, self.originals)

    def _read(self, name: str) -> Tensor:
        if name not in self._origin:
            raise ModelError(f"{self._source.name}: the checkpoint has no {name}, which the rotation has to fold")
        return self._source.read(self._origin[name]).to(self._device)


def stored_names(source: CheckpointSource, model: PreTrainedModel) -> dict[str, str]:
    """Return model name -> checkpoint name of every stored tensor: families that were renamed in transformers keep
    their stored names, which other readers know.

    Raises:
        ModelError: the family also regroups tensors.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    if len(renamings) < len(conversions):
        raise ModelError(
            f"{source.name}: the family {model.config.model_type!r} merges tensors when it is loaded (mixtures of "
            "experts do), which cannot be read one by one; only dense models are supported"
        )
    stored: dict[str, str] = {}
    for checkpoint_name in source.names():
        name = checkpoint_name
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        stored[name] = checkpoint_name
    return stored


def _shared_tensors(source: CheckpointSource, model: Any, stored: dict[str, str]) -> dict[str, str]:
    """Return target -> origin for the names that share a tensor in the checkpoint; as transformers resolves them.

    A config may ask for a tie while the checkpoint holds two different tensors: then they are two.
    """
    shared: dict[str, str] = {}
    for target, origin in model.all_tied_weights_keys.items():
        both = target in stored and origin in stored
        if both and not torch.equal(source.read(stored[target]), source.read(stored[origin])):
            log.warning("%s: %s and %s are tied in config.json but differ: loaded untied", source.name, target, origin)
        elif target in stored and origin not in stored:
            shared[origin] = target
        else:
            shared[target] = origin
    return shared


def _origins(
    source: CheckpointSource, model: PreTrainedModel, stored: dict[str, str], shared: dict[str, str]
) -> dict[str, str]:
    """Return model name -> checkpoint name for every parameter and every buffer that checkpoints store."""
    wanted = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    unstored = {name for name, _ in model.named_non_persistent_buffers()}
    wanted += [name for name, _ in model.named_buffers() if name not in unstored]
    missing = [name for name in wanted if shared.get(name, name) not in stored]
    if missing:
        raise ModelError(
            f"{source.name}: the checkpoint lacks {len(missing)} of {len(wanted)} parameters of "
            f"{type(model).__name__}: {_listing(missing)}; download it again, or give the one that config.json is of"
        )
    return {name: stored[shared.get(name, name)] for name in wanted}


def _report_unexpected(source: CheckpointSource, model: Any, unused: list[str]) -> None:
    """Log the checkpoint's tensors that the model has no place for, but for those that the family declares obsolete."""
    obsolete = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    unexpected = [name for name in unused if not any(re.search(pattern, name) for pattern in obsolete)]
    if unexpected:
        log.warning("%s: %d tensors have no place in the model: %s", source.name, len(unexpected), _listing(unexpected))


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
