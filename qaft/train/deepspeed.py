"""DeepSpeed as an engine, and its only importer: what is trained is partitioned over the ranks, stage by stage.

    stage               0        1         2         3
    trained parameters  whole    whole     whole     1/N, gathered layer by layer
    gradients           whole    whole     1/N       1/N
    optimizer state     whole    1/N       1/N       1/N
    frozen weights      whole    whole     whole     whole

with N ranks. The frozen base is packed to 4 or 8 bits and replicated in every stage: its codes and scales are buffers,
which DeepSpeed leaves alone, and gathering them would cost more traffic in every pass than the gradients of a step.
``qaft plan`` shows what that means in bytes. The other frozen parameters (embedding, norms, head) are turned into
buffers while the engine lives, for three reasons: stage 3 would partition them, although the loss reads the head
outside of its forward pass; it would take the dtype of everything from the first parameter it meets; and every stage
would broadcast them once more.

Gradients: the loss is already divided by the targets of the whole step (``objective.py``), so DeepSpeed must not divide
by the micro-batches again; it averages over ranks as the other engine does.

Updates of partitioned parameters are element by element (``qaft/compat/`` refuses the optimizers that are not), so
every stage takes the steps that one process takes.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from qaft.distributed import connect
from qaft.errors import RecipeError, TrainingError
from qaft.train.engine import OptimizerState, StepInfo
from qaft.train.frozen import hide_frozen, show_frozen
from qaft.train.partitions import Partitions
from qaft.train.trackers import Trackers

if not torch.cuda.is_available():
    # DeepSpeed would come to the same choice, with a warning.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
try:
    import deepspeed
except ImportError as error:
    raise RecipeError(
        f"train.deepspeed needs DeepSpeed ({error}): pip install 'qaft[deepspeed]', or leave train.deepspeed out"
    ) from error

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# On CPUs it would compile a collective of its own for a minute (if there is a compiler); gloo has the same one.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class DeepSpeedEngine:
    """Ranks that share what is trained: ``Engine`` by DeepSpeed.

    Args:
        module: the loss module; frozen parameters are hidden from DeepSpeed until ``release``.
        optimizer: over the trainable fp32 parameters; stays the one that is stepped, with its groups.
        config: for ``deepspeed.initialize``, without ``"auto"``; holds clipping and accumulation (``qaft/zero.py``).
        device: where this rank computes.
        loss_scale: a power of two, multiplied into the loss and divided out of every gradient; for fp16 models.
        report_to: names of accelerate trackers.
        folder: where trackers that write files put them.

    Raises:
        RecipeError: a tracker is unknown or its package is not installed.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        config: Mapping[str, Any],
        *,
        device: torch.device,
        loss_scale: float = 1.0,
        report_to: Sequence[str] = (),
        folder: Path | None = None,
    ) -> None:
        connect(device)
        self._trackers = Trackers(report_to, folder=folder, cpu=device.type == "cpu")
        self._module = module
        self._optimizer = optimizer
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._shapes = {id(p): p.shape for p in self._trained()}
        self._stage: int = config["zero_optimization"]["stage"]
        self._accumulation: int = config["gradient_accumulation_steps"]
        self._back_propagated = 0
        self._loss_scale = loss_scale
        self._hidden = hide_frozen(module)
        # Autograd checks gradients against the shape that a parameter had when its accumulator was made. At stage 3
        # a custom function would make it while the parameter is partitioned, that is empty.
        self._accumulators = [p.view_as(p).grad_fn.next_functions[0][0] for p in self._trained()]  # pyright: ignore
        self._engine: Any = deepspeed.initialize(model=module, optimizer=optimizer, config=dict(config))[0]
        if self._stage > 0:
            # Multiplied into the loss, and taken out of the gradients after they are measured and before they clip.
            self._engine.optimizer.override_loss_scale(loss_scale)
        self._partitions = Partitions(self._engine.optimizer, self._stage, self._groups, self._shapes, self.device)

    @property
    def module(self) -> nn.Module:
        """The module that was given."""
        return self._module

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device(self._engine.device)

    @property
    def rank(self) -> int:
        """Index of this process."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return dist.get_world_size()

    @property
    def due(self) -> bool:
        """Whether every micro-batch of the step has been back-propagated."""
        return self._back_propagated == self._accumulation

    def __call__(self, **batch: Tensor | None) -> Tensor:
        """Return the module's value for the tensors of ``batch``, moved to this rank's device."""
        tensors = {k: v.to(self.device, non_blocking=True) for k, v in batch.items() if v is not None}
        return self._engine(**tensors)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``; it is averaged over ranks at the latest with the last micro-batch."""
        self._back_propagated += 1
        self._engine.set_gradient_accumulation_boundary(self.due)
        if self._stage == 0 and self._loss_scale != 1.0:
            loss = loss * self._loss_scale
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> StepInfo:
        """Clip by the global norm, step and clear the gradients; a norm that is not finite steps nothing."""
        self._back_propagated = 0
        if self._stage == 0:
            return self._step_whole()
        self._engine.step()
        stepped = self._engine.was_step_applied()
        # The ZeRO optimizers put a placeholder where the norm is not finite.
        norm = float(self._engine.get_global_grad_norm()) if stepped else math.inf
        return StepInfo(grad_norm=norm, stepped=stepped)

    def _step_whole(self) -> StepInfo:
        """Step at stage 0, where DeepSpeed measures no norm without clipping and never refuses one."""
        gradients = [p.grad for p in self._trained() if p.grad is not None]
        if self._loss_scale != 1.0:
            for gradient in gradients:
                gradient.mul_(1.0 / self._loss_scale)
        norm = float(get_total_norm(gradients))
        stepped = math.isfinite(norm)
        if stepped:
            self._engine.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepInfo(grad_norm=norm, stepped=stepped)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over processes; collective."""
        total = value.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def whole_parameters(self, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return the parameters, gathered one by one, on the CPU of rank 0 and on meta elsewhere; collective.

        Raises:
            TrainingError: a gathered parameter does not have its shape.
        """
        whole: dict[str, Tensor] = {}
        for name, param in params.items():
            with self._gathered(param):
                self._check_whole(name, param, param)
                whole[name] = param.detach().to("cpu" if self.rank == 0 else "meta", copy=True)
        return whole

    def load_parameters(self, params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        """Set the parameters and the partitions that the optimizer steps; collective."""
        for name, param in params.items():
            value = values[name].to(device=self.device, dtype=param.dtype)
            with self._gathered(param, modifier_rank=0), torch.no_grad():
                self._check_whole(name, value, param)
                param.copy_(value)
        if self._stage > 0:
            names = {id(param): name for name, param in params.items()}
            for flat, owned in self._partitions:
                for param in owned:
                    self._partitions.scatter(values[names[id(param)]], flat, param)

    def optimizer_state(self) -> OptimizerState:
        """Return the optimizer's ``state_dict`` for whole parameters, on the CPU of rank 0; collective."""
        if self._stage == 0:
            return self._optimizer.state_dict()
        indices = {id(param): index for index, param in enumerate(self._trained())}
        groups = [
            {k: v for k, v in group.items() if k != "params"} | {"params": [indices[id(p)] for p in params]}
            for group, params in zip(self._optimizer.param_groups, self._groups, strict=True)
        ]
        state: dict[int, dict[str, Any]] = {}
        for flat, params in self._partitions:
            kept = self._optimizer.state.get(flat, {})
            for param in params if kept else ():
                state[indices[id(param)]] = self._whole_state(param, flat, kept)
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Partition the state of whole parameters anew, whatever ranks and engine it comes from; collective."""
        if self._stage == 0:
            self._optimizer.load_state_dict(state)
            return
        for group, saved in zip(self._optimizer.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        entries = {id(p): state["state"][i] for i, p in enumerate(self._trained()) if i in state["state"]}
        for flat, params in self._partitions if entries else ():
            kept = {key: self._as_state(value, flat, params[0]) for key, value in entries[id(params[0])].items()}
            for key in (key for key, value in kept.items() if _is_like(value, flat.shape)):
                for param in params:
                    self._partitions.scatter(entries[id(param)][key], kept[key], param)
            self._optimizer.state[flat] = kept

    def release(self) -> None:
        """Leave an ordinary module: whole parameters, no hooks, frozen parameters in their places; collective."""
        whole: dict[int, nn.Parameter] = {}
        for param in self._trained():
            with self._gathered(param):
                whole[id(param)] = nn.Parameter(param.detach().clone())
        self._engine.destroy()
        for module in self._module.modules():
            # Stage 3 has put another mapping there, which gathers what it returns, and its marks on the parameters.
            module._parameters = {name: whole.get(id(param), param) for name, param in list(module._parameters.items())}
        show_frozen(self._hidden)

    def wait(self) -> None:
        """Return when every process has come here; collective."""
        dist.barrier()

    def start_trackers(self, project: str, config: Mapping[str, Any]) -> None:
        """Open the trackers of ``report_to``."""
        self._trackers.start(project, config)

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send values to the trackers."""
        self._trackers.track(values, step)

    def end_trackers(self) -> None:
        """Flush and close the trackers, and leave the process group."""
        self._trackers.end()
        dist.destroy_process_group()

    def _trained(self) -> Iterator[nn.Parameter]:
        return (param for group in self._groups for param in group)

    def _gathered(self, param: nn.Parameter, modifier_rank: int | None = None) -> Any:
        if self._stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters([param], modifier_rank=modifier_rank)

    def _whole_state(self, param: nn.Parameter, flat: Tensor, kept: Mapping[str, Any]) -> dict[str, Any]:
        whole: dict[str, Any] = {}
        for key, value in kept.items():
            if _is_like(value, flat.shape):
                value = self._partitions.gather(value, param)
            if self.rank == 0:
                whole[key] = value.detach().cpu().clone() if isinstance(value, Tensor) else value
        return whole

    def _as_state(self, value: Any, flat: Tensor, param: nn.Parameter) -> Any:
        """Return an entry of a parameter's state as one of a flat tensor; values per element are zeros yet."""
        if _is_like(value, self._shapes[id(param)]):
            return torch.zeros_like(flat)
        return value.to(flat.device, copy=True) if isinstance(value, Tensor) else value

    def _check_whole(self, name: str, tensor: Tensor | None, param: nn.Parameter) -> None:
        expected = self._shapes[id(param)]
        if tensor is None or tensor.shape != expected:
            found = None if tensor is None else list(tensor.shape)
            raise TrainingError(
                f"{name}: ZeRO stage {self._stage} gathered {found}, not {list(expected)}; nothing was written. "
                "This is a defect, please report it"
            )


def _is_like(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape
