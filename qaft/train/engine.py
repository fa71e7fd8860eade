"""What the loop asks of whatever runs the model: forward, backward, step. Methods never see which engine it is.

The accelerate engine places the model, averages gradients over ranks, accumulates micro-batches, clips and steps.
``qaft/train/deepspeed.py`` is the other engine: it also partitions what is trained over the ranks.

Precision: no autocast. The frozen model already is in its compute dtype and every update casts its fp32 parameters to
the dtype of its input; autocast would only override the places that chose fp32 on purpose (norms, softmax, the loss).
Gradients are accumulated, averaged and clipped in the dtype of the parameters. fp16 models need ``loss_scale``: a power
of two is exact in the fp32 gradients and keeps the fp16 ones inside the model away from underflow.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from qaft.train.trackers import Trackers

OptimizerState = dict[str, Any]
"""The ``state_dict`` of the optimizer as it was built: whole tensors for each parameter, whoever partitions them."""


@dataclass(frozen=True)
class StepInfo:
    """One optimizer step: the gradient norm before clipping, and whether the parameters were stepped."""

    grad_norm: float
    stepped: bool


class Engine(Protocol):
    """Runs forward, backward and optimizer steps over one or more processes.

    Laws: gradients of ``backward`` calls add up until ``step`` and are averaged over ranks; ``step`` is called when
    ``due`` is true, that is after all micro-batches of the optimizer step. Between steps a parameter may be partitioned
    over the ranks: only ``whole_parameters`` and, after ``release``, the module itself give its values.
    """

    @property
    def module(self) -> nn.Module:
        """The model as given, without the engine's wrapping."""
        ...

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        ...

    @property
    def rank(self) -> int:
        """Index of this process."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    @property
    def due(self) -> bool:
        """Whether every micro-batch of the step has been back-propagated."""
        ...

    def __call__(self, **batch: Tensor | None) -> Tensor:
        """Return the sum of losses of a micro-batch, as the module computes it."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to the parameters' gradients."""
        ...

    def step(self) -> StepInfo:
        """Clip, step the optimizer and clear the gradients; a norm that is not finite steps nothing."""
        ...

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over processes, equal on all; collective."""
        ...

    def whole_parameters(self, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return the trained values by name; on ranks but 0 they may be meta tensors; collective."""
        ...

    def load_parameters(self, params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        """Set trained parameters to whole tensors, equal on all ranks; collective."""
        ...

    def optimizer_state(self) -> OptimizerState:
        """Return the optimizer's state for whole parameters, complete on rank 0; collective."""
        ...

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Set the optimizer's state from whole tensors, equal on all ranks, of any engine; collective."""
        ...

    def release(self) -> None:
        """Leave an ordinary module with whole parameters; nothing can be trained afterwards; collective."""
        ...

    def wait(self) -> None:
        """Return when every process has come here; collective."""
        ...

    def start_trackers(self, project: str, config: Mapping[str, Any]) -> None:
        """Open the trackers that the engine was built with."""
        ...

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send values to the trackers."""
        ...

    def end_trackers(self) -> None:
        """Let trackers write what they hold, and leave the process group; the last call of a run."""
        ...


class AccelerateEngine:
    """One process or data-parallel ones (``accelerate launch``, ``torchrun``), on GPU or CPU.

    Args:
        module: the loss module (``CausalLoss``); moved to this rank's device.
        optimizer: over the trainable parameters of ``module``; used as it is.
        accumulation: micro-batches per optimizer step.
        clip: largest norm of the whole gradient; None for no clipping (the norm is still reported).
        loss_scale: factor on the loss that ``step`` takes out of the gradients again; for fp16 models.
        report_to: names of accelerate trackers.
        folder: where trackers that write files put them.
        cpu: stay on the CPU although there is a GPU.

    Raises:
        RecipeError: a tracker is unknown or its package is not installed.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        accumulation: int = 1,
        clip: float | None = None,
        loss_scale: float = 1.0,
        report_to: Sequence[str] = (),
        folder: Path | None = None,
        cpu: bool = False,
    ) -> None:
        # Broadcasting buffers would send the packed frozen weights over the network in every forward pass.
        parallel = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        # "no" overrides ACCELERATE_MIXED_PRECISION: see the top of this file.
        self._accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[parallel])
        self._trackers = Trackers(report_to, folder=folder, cpu=cpu)
        with warnings.catch_warnings():
            # torch renames broadcast_buffers; the new option still sends the buffers once.
            warnings.simplefilter("ignore", FutureWarning)
            self._wrapped: Any = self._accelerator.prepare_model(module)
        self._module = module
        self._optimizer = optimizer
        self._accumulation = accumulation
        self._clip = clip
        self._loss_scale = loss_scale
        self._back_propagated = 0

    @property
    def module(self) -> nn.Module:
        """The module that was given."""
        return self._module

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._accelerator.device

    @property
    def rank(self) -> int:
        """Index of this process."""
        return self._accelerator.process_index

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._accelerator.num_processes

    @property
    def due(self) -> bool:
        """Whether every micro-batch of the step has been back-propagated."""
        return self._back_propagated == self._accumulation

    def __call__(self, **batch: Tensor | None) -> Tensor:
        """Return the module's value for the tensors of ``batch``, moved to this rank's device."""
        tensors = {k: v.to(self.device, non_blocking=True) for k, v in batch.items() if v is not None}
        # DDP decides in the forward pass whether the backward pass that follows will average gradients.
        is_last = self._back_propagated == self._accumulation - 1
        with nullcontext() if is_last else self._accelerator.no_sync(self._wrapped):
            return self._wrapped(**tensors)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``; over ranks it is averaged with the last micro-batch of the step."""
        (loss * self._loss_scale if self._loss_scale != 1.0 else loss).backward()
        self._back_propagated += 1

    def step(self) -> StepInfo:
        """Clip by the global norm, step and clear the gradients; a norm that is not finite steps nothing."""
        params = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in params if p.grad is not None]
        if self._loss_scale != 1.0:
            for gradient in gradients:
                gradient.mul_(1.0 / self._loss_scale)
        norm = get_total_norm(gradients)
        stepped = bool(torch.isfinite(norm))
        if stepped:
            if self._clip is not None:
                clip_grads_with_norm_(params, self._clip, norm)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._back_propagated = 0
        return StepInfo(grad_norm=float(norm), stepped=stepped)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over processes; collective."""
        return self._accelerator.reduce(value.to(self.device), reduction="sum")  # type: ignore[return-value]

    def whole_parameters(self, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return the parameters themselves, which every rank holds."""
        return {name: param.detach() for name, param in params.items()}

    def load_parameters(self, params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        """Copy ``values`` into the parameters."""
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(values[name])

    def optimizer_state(self) -> OptimizerState:
        """Return the optimizer's ``state_dict``."""
        return self._optimizer.state_dict()

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Load a ``state_dict``."""
        self._optimizer.load_state_dict(state)

    def release(self) -> None:
        """Do nothing: the module that was given has always been an ordinary one."""

    def wait(self) -> None:
        """Return when every process has come here; collective."""
        self._accelerator.wait_for_everyone()

    def start_trackers(self, project: str, config: Mapping[str, Any]) -> None:
        """Open the trackers of ``report_to``."""
        self._trackers.start(project, config)

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send values to the trackers."""
        self._trackers.track(values, step)

    def end_trackers(self) -> None:
        """Flush and close the trackers, and leave the process group; the engine cannot be called any more."""
        self._trackers.end()
        # If DDP's reducer were the last to let go of a gloo group, it would wait, holding Python's lock, for a thread
        # that waits for the lock.
        self._wrapped = None
        self._accelerator.free_memory()
        self._accelerator.end_training()
