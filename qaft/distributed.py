"""The process group of a job: connected once, before the first collective, whatever started the processes."""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.rendezvous import rendezvous

from qaft.ranks import world_size

_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def connect(device: torch.device) -> None:
    """Connect this process to the others of its job; a process that is alone becomes a group of one.

    Tensors on GPUs go through NCCL, those in host memory through gloo. Does nothing the second time. A process that
    ends leaves the group before its interpreter does.

    Args:
        device: where this process computes.
    """
    if dist.is_initialized():
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    # A thread of gloo that lets go of a tensor while the interpreter ends aborts the process, whatever its exit code.
    atexit.register(_leave)
    if world_size() > 1:
        dist.init_process_group(backend, **_meeting_place())
        return
    # DeepSpeed looks for MPI where these are missing.
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def _meeting_place() -> dict[str, Any]:
    """Return where the processes of a job find each other, as ``init_process_group`` takes it; nothing: as it does.

    torchrun (2.13) keeps one store through ``--max_restarts``. In it are the addresses of processes that are gone, and
    those that come back must not find them: they would be refused, or wait for half an hour.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0":
        return {}
    store, rank, size = next(rendezvous("env://"))
    return {"store": PrefixStore(f"restart_{restarts}", store), "rank": rank, "world_size": size}


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
