"""One forward pass of a checkpoint of which only one decoder layer is in memory at a time.

The model is built without weights; each layer, and each other part that holds some, gets its own when the forward pass
reaches it and loses them when it is left. The family's own forward runs, unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qaft.arch.base import Arch
from qaft.models.heap import release_freed_memory
from qaft.models.reading import ModelReader
from qaft.models.skeleton import empty_model, initialize_buffers
from qaft.models.source import CheckpointSource

Visit = Callable[[int, nn.Module], None]
"""(index of a decoder layer, the layer), called before or after it ran, with its weights in place."""


class LayerwiseModel:
    """A checkpoint that runs layer by layer, in fp32.

    Args:
        source: the checkpoint.
        arch: its names and sizes.
        device: where it runs.
        attention: the attention function.
        current: parameter name -> the value to use instead of the checkpoint's, or None for that.

    Attributes:
        model: the transformers model; outside of ``run`` its parameters are on the meta device.
        originals: every parameter as the checkpoint has it, by its name in the model.

    Raises:
        ModelError: the checkpoint does not fit the model.
    """

    def __init__(
        self,
        source: CheckpointSource,
        arch: Arch,
        *,
        device: torch.device,
        attention: str = "sdpa",
        current: Callable[[str], Tensor | None] = lambda _: None,
    ) -> None:
        self.model: PreTrainedModel = empty_model(
            source.config, dtype=torch.float32, attention=attention, trust_remote_code=source.trust_remote_code
        )
        self._arch = arch
        self._reader = ModelReader(source, self.model, None, device)
        self._device = device
        self._current = current
        self.originals = self._reader.originals
        initialize_buffers(self.model, device)

    @torch.no_grad()
    def run(self, inputs: dict[str, Any], *, before: Visit, after: Visit) -> None:
        """Run the decoder on ``inputs``, without its head; the callbacks see every layer with its weights."""
        layers = {name: i for i, name in enumerate(self._arch.layers())}
        handles = []
        for name, module in self._parts(set(layers)):
            index = layers.get(name)
            handles.append(module.register_forward_pre_hook(self._entering(name, index, before)))
            handles.append(module.register_forward_hook(self._leaving(index, after)))
        try:
            decoder: Any = self.model.get_decoder()
            decoder(**{k: v.to(self._device) if isinstance(v, Tensor) else v for k, v in inputs.items()})
        finally:
            for handle in handles:
                handle.remove()
            _unload(self.model)

    def _parts(self, layers: set[str]) -> list[tuple[str, nn.Module]]:
        """Return the decoder layers, and every other module that has parameters of its own outside of them."""
        inside = tuple(f"{name}." for name in layers)
        return [
            (name, module)
            for name, module in self.model.named_modules()
            if name in layers or (not name.startswith(inside) and module._parameters)
        ]

    def _entering(self, name: str, index: int | None, before: Visit) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any) -> None:
            for leaf, parameter in list(module.named_parameters()):
                tensor = self._current(f"{name}.{leaf}")
                tensor = self._reader.read(f"{name}.{leaf}", parameter) if tensor is None else tensor
                owner, _, last = leaf.rpartition(".")
                setattr(
                    module.get_submodule(owner), last, nn.Parameter(tensor.to(parameter.dtype), requires_grad=False)
                )
            if index is not None:
                before(index, module)

        return hook

    def _leaving(self, index: int | None, after: Visit) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            if index is not None:
                after(index, module)
            _unload(module)
            release_freed_memory()

        return hook


def _unload(module: nn.Module) -> None:
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
