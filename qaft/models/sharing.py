"""One rank reads and quantizes a checkpoint; the others receive what came out of it, one layer at a time.

Host memory and reads of the file system do not grow with the number of ranks: a receiving rank holds its packed model
and the layer under way, on its own device, and never opens a weight file. The bytes are those of rank 0, so that scales
and codes are equal everywhere, which two quantizations on two kinds of GPU need not be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qaft.distributed import connect
from qaft.models.source import CheckpointSource, source_of
from qaft.ranks import world_size
from qaft.sections import ModelSection

T = TypeVar("T")


class Sharing:
    """What rank 0 makes, on every rank of the job; every method is collective and takes what makes it on rank 0.

    An error on rank 0 is raised on every rank, so that none waits for a tensor that does not come.

    Args:
        device: of the tensors.
        active: False for a process that makes everything itself, also when others exist (an export on rank 0).

    Attributes:
        reads: whether this rank makes things.
    """

    def __init__(self, device: torch.device, *, active: bool) -> None:
        self._device = device
        self._active = active and world_size() > 1
        if self._active:
            connect(device)
        self.reads = not self._active or dist.get_rank() == 0

    def value(self, make: Callable[[], T]) -> T:
        """Return ``make()`` of rank 0: anything that can be pickled, without large tensors."""
        if not self._active:
            return make()
        return self._outcome(make, lambda made: made)

    def tensor(self, make: Callable[[], Tensor]) -> Tensor:
        """Return ``make()`` of rank 0, on the device of this rank."""
        if not self._active:
            return make()
        tensor = self._outcome(make, lambda made: torch.empty_like(made, device="meta"))
        return self._received(tensor)

    def module(self, make: Callable[[], nn.Module]) -> Any:
        """Return ``make()`` of rank 0, a module whose only tensors are its own buffers."""
        if not self._active:
            return make()
        module = self._outcome(make, _without_tensors)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = self._received(buffer)
        return module

    def _outcome(self, make: Callable[[], Any], outline: Callable[[Any], Any]) -> Any:
        """Return ``make()`` on rank 0 and its outline on the others, or raise what ``make`` raised."""
        made, message = None, [None, None]
        if self.reads:
            try:
                made = make()
                message = [outline(made), None]
            except Exception as error:
                message = [None, error]
        dist.broadcast_object_list(message, src=0, device=torch.device("cpu"))
        if message[1] is not None:
            raise message[1]
        return made if self.reads else message[0]

    def _received(self, tensor: Tensor) -> Tensor:
        """Return rank 0's tensor; the others give one on the meta device."""
        if tensor.device.type == "meta":
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        if tensor.numel():
            # As bytes: exact for every dtype, whatever the backend knows.
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=0)
        return tensor


def shared_source(section: ModelSection, sharing: Sharing) -> CheckpointSource:
    """Return the checkpoint of ``section`` as rank 0 has opened it; collective.

    Raises:
        ModelError: see ``source_of``.
    """
    if section.trust_remote_code:
        # A configuration class that the checkpoint ships cannot be sent to a process that has not imported it.
        return source_of(section)
    return sharing.value(lambda: source_of(section))


def _without_tensors(module: nn.Module) -> nn.Module:
    assert not module._parameters and not module._modules, "only the module's own buffers are sent"
    outline = copy.copy(module)
    outline._buffers = {
        name: None if buffer is None else torch.empty_like(buffer, device="meta")
        for name, buffer in module._buffers.items()
    }
    return outline
