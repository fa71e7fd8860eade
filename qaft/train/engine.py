"""What the loop asks of whatever runs the model: forward, backward, step. Methods never see which engine it is.

The accelerate engine places the model, averages gradients over ranks, accumulates micro-batches, clips and steps.

Precision: no autocast. The frozen model already is in its compute dtype and every update casts its fp32 parameters to
the dtype of its input; autocast would only override the places that chose fp32 on purpose (norms, softmax, the loss).
Gradients are accumulated, averaged and clipped in the dtype of the parameters. fp16 models need ``loss_scale``: a power
of two is exact in the fp32 gradients and keeps the fp16 ones inside the model away from underflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, LoggerType
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from qaft.errors import RecipeError
from qaft.registry import suggest


@dataclass(frozen=True)
class StepInfo:
    """One optimizer step: the gradient norm before clipping, and whether the parameters were stepped."""

    grad_norm: float
    stepped: bool


class Engine(Protocol):
    """Runs forward, backward and optimizer steps over one or more processes.

    Laws: gradients of ``backward`` calls add up until ``step`` and are averaged over ranks; ``step`` is called when
    ``due`` is true, that is after all micro-batches of the optimizer step.
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

    def wait(self) -> None:
        """Return when every process has come here; collective."""
        ...

    def end_trackers(self) -> None:
        """Let trackers write what they hold; without trackers nothing happens."""
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
        _check_trackers(report_to)
        # "no" overrides ACCELERATE_MIXED_PRECISION: see the top of this file.
        self._accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no",
            log_with=list(report_to) or None,
            project_dir=folder,
            kwargs_handlers=[parallel],
        )
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

    def wait(self) -> None:
        """Return when every process has come here; collective."""
        self._accelerator.wait_for_everyone()

    def start_trackers(self, project: str, config: Mapping[str, Any]) -> None:
        """Open the trackers of ``report_to``; ``config`` is flattened to ``section.key``, some take no nesting."""
        self._accelerator.init_trackers(project, config=_flatten(config))

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send values to the trackers."""
        self._accelerator.log(dict(values), step=step)

    def end_trackers(self) -> None:
        """Flush and close the trackers."""
        self._accelerator.end_training()


def _check_trackers(names: Sequence[str]) -> None:
    # accelerate itself passes over a tracker whose package is missing.
    known = sorted(str(name) for name in LoggerType if name != LoggerType.ALL)
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise RecipeError(f"train.report_to: {name!r} must be one of {', '.join(known)}{suggest(name, known)}")
        if name not in available:
            raise RecipeError(f"train.report_to: {name} cannot be imported; pip install it, or leave it out")


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    flat: dict[str, int | float | str | bool] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
