"""Logits of a model stored in 16 bits, with every product formed in fp32, and without a second copy of the model.

Weights keep the values they are rounded to; activations are not rounded. Two models with the same weights then agree
to the rounding of fp32 whatever module computes them, so the weights of an export can be compared by its logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qaft.bases.base import FrozenLinear
from qaft.evaluate.client_layers import held_weights
from qaft.updates.base import Update


@contextmanager
def float32_weights(model: nn.Module, *, via: torch.dtype | None = None) -> Iterator[None]:
    """Let every module see fp32 copies of its own parameters while its forward runs; the model itself stays as it is.

    Frozen and adapted linear layers are left alone: they round their weight to its own dtype and then compute in that
    of their input. The largest copy alive is one module's.

    Args:
        model: a transformers model, with or without adapted layers.
        via: round the parameters to this dtype first, as an export in it would; None for the values as they are.
    """
    originals: dict[int, Tensor] = {}
    handles: list[Any] = []
    widened: list[Tensor] = []
    try:
        for module, own in _widened_together(model, set()):
            tensors = _wide_tensors(module, own, via)
            if tensors:
                widened += tensors
                handles.append(module.register_forward_pre_hook(_widen(tensors, via, originals)))
                handles.append(module.register_forward_hook(_restore(tensors, originals), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        _restore(widened, originals)()


def _widened_together(module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Yield every module with the tensors that its forward reads: those of its own, of a layer of PEFT all of them."""
    if module in seen or isinstance(module, (FrozenLinear, Update)):
        return
    seen.add(module)
    # It casts its input to the dtype of its factors before it calls them.
    is_whole = hasattr(module, "base_layer")
    yield module, [*module.parameters(recurse=is_whole), *module.buffers(recurse=is_whole)]
    for child in () if is_whole else module.children():
        yield from _widened_together(child, seen)


def _wide_tensors(module: nn.Module, own: Sequence[Tensor], via: torch.dtype | None) -> list[Tensor]:
    # An export holds parameters and persistent buffers; every reader computes rotary frequencies, say, anew in fp32.
    rounds = via not in (None, torch.float32)
    exported = {id(t) for t in module.state_dict(keep_vars=True).values()} if rounds else set()
    return [t for t in own if t.is_floating_point() and (t.dtype != torch.float32 or id(t) in exported)]


def _widen(tensors: Sequence[Tensor], via: torch.dtype | None, originals: dict[int, Tensor]) -> Any:
    def hook(*_: Any) -> None:
        for tensor in tensors:
            originals[id(tensor)] = tensor.data
            tensor.data = tensor.data.to(via or tensor.dtype).float()

    return hook


def _restore(tensors: Sequence[Tensor], originals: dict[int, Tensor]) -> Any:
    def hook(*_: Any) -> None:
        for tensor in tensors:
            if id(tensor) in originals:
                tensor.data = originals.pop(id(tensor))

    return hook


@torch.no_grad()
def native_logits(model: nn.Module, prompts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the logits of each prompt (int64 [T]) in the model's own dtype, as fp32 [T, V] on the CPU."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        # Kernels of bitsandbytes for CPUs round scales, once and for all, and refuse some shapes.
        with held_weights(model) if device.type == "cpu" else nullcontext():
            return tuple(
                model(input_ids=ids.to(device)[None], use_cache=False).logits[0].float().cpu() for ids in prompts
            )
    finally:
        model.train(training)


@torch.no_grad()
def float_logits(model: nn.Module, prompts: Sequence[Tensor], *, via: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Return the fp32 logits of each prompt (int64 [T]) as [T, V] on the CPU; the model is as it was afterwards.

    Args:
        model: a transformers causal LM; prompts are moved to its device and evaluated one by one, without padding.
        prompts: token ids.
        via: see ``float32_weights``.
    """
    device = next(model.parameters()).device
    training, precision = model.training, torch.get_float32_matmul_precision()
    model.eval()
    # TF32 keeps 10 bits of the mantissa: far coarser than the bound that these logits are compared with.
    torch.set_float32_matmul_precision("highest")
    try:
        with held_weights(model), float32_weights(model, via=via):
            return tuple(
                model(input_ids=ids.to(device)[None], use_cache=False).logits[0].float().cpu() for ids in prompts
            )
    finally:
        torch.set_float32_matmul_precision(precision)
        model.train(training)
