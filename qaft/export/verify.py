"""Reload an export in a fresh process with plain transformers, and compare its fp32 logits with the live run's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qaft
from qaft.errors import ExportError
from qaft.evaluate.difference import Difference, PromptLogits, compare_logits, prompt_ids
from qaft.evaluate.float32 import float_logits
from qaft.export.activations import plain_activations
from qaft.export.base import EXACT, OTHER_DEVICE, Linear, Written
from qaft.export.tensors import linear_layers, model_dtype, model_parts
from qaft.layers.attach import replace_module

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that would make the fresh process wait for its siblings."""

_HEADROOM = 1.5
"""Free memory needed for a second model, relative to its weights: activations, and one layer in fp32."""


@dataclass(frozen=True)
class Verification:
    """``difference``: the reload against the reference; ``rounding``: the reference against the run, if they differ."""

    difference: Difference
    rounding: Difference | None


class _ExportedLinear(nn.Module):
    """A linear layer with the weight that was exported for it."""

    def __init__(self, weight: Callable[[], Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight_of = weight
        self.bias = None if bias is None else bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T + b``, [..., I] -> [..., O]."""
        bias = self.bias
        return F.linear(x, self.weight_of().to(x.dtype), None if bias is None else bias.to(x.dtype))


@contextmanager
def exported_weights(
    model: nn.Module, weight_of: Callable[[str, Linear], Tensor], dtype: torch.dtype
) -> Iterator[None]:
    """Let the live model compute with the weights of an export; afterwards it is as it was."""
    layers = linear_layers(model)
    try:
        for name, layer in layers.items():
            bind = _ExportedLinear(lambda n=name, m=layer: weight_of(n, m), layer.bias, dtype)
            replace_module(model, name, bind)
        yield
    finally:
        for name, layer in layers.items():
            replace_module(model, name, layer)


def verify_export(loaded: LoadedModel, folder: Path, written: Written) -> Verification:
    """Return how far the export in ``folder`` is from what it should be, with plain activations on both sides.

    Raises:
        ExportError: plain transformers cannot load it.
        DifferenceError: it differs by more than ``written.bound``.
    """
    ids = prompt_ids(loaded.tokenizer)
    with plain_activations(loaded.model):
        trained = PromptLogits(ids, float_logits(loaded.model, ids))
        reference = trained
        if written.exported_weight is not None:
            with exported_weights(loaded.model, written.exported_weight, written.dtype):
                reference = PromptLogits(ids, float_logits(loaded.model, ids, via=written.dtype))
    live = next(loaded.model.parameters()).device
    device = _device_for_reload(loaded, live)
    dtype = None if written.base is None else model_dtype(loaded)
    reloaded = reload_logits(folder, ids, device=device, base=written.base, dtype=dtype)
    difference = compare_logits(reference, reloaded)
    bound = OTHER_DEVICE if written.bound is EXACT and device.type != live.type else written.bound
    bound.check(difference)
    return Verification(difference, None if reference is trained else compare_logits(trained, reference))


def reload_logits(
    folder: Path,
    ids: Sequence[Tensor],
    *,
    device: torch.device | str = "cpu",
    base: Path | None = None,
    dtype: torch.dtype | None = None,
) -> PromptLogits:
    """Return the fp32 logits of an exported folder, computed by a fresh process that loads it without qaft.

    Args:
        folder: the export.
        ids: prompts, int64 [T].
        device: where the process computes.
        base: for an adapter, the folder of its model.
        dtype: dtype in which ``base`` is loaded; None for the checkpoint's own.

    Raises:
        ExportError: the process failed; the message ends with its last line.
    """
    # Zero-padded: safetensors sorts by name.
    request = {f"{i:04d}": tokens for i, tokens in enumerate(ids)}
    with tempfile.TemporaryDirectory(prefix="qaft-verify-") as scratch:
        question, answer = Path(scratch, "ids.safetensors"), Path(scratch, "logits.safetensors")
        save_file(request, question)
        extra = [] if base is None else [str(base), str(dtype).removeprefix("torch.") if dtype else "auto"]
        script = Path(__file__).with_name("reload.py")
        # -P: the script's own folder has modules named like libraries (peft).
        command = [sys.executable, "-P", str(script), str(folder), str(question), str(answer), str(device), *extra]
        result = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            raise ExportError(
                "plain transformers cannot load the export in a fresh process "
                f"({lines[-1] if lines else result.returncode}); nothing was written; report it, or set verify: false "
                "in the export section to keep the files"
            )
        found = load_file(answer)
    return PromptLogits(tuple(ids), tuple(found[name] for name in request))


def _environment() -> dict[str, str]:
    inherited: dict[str, str] = {k: v for k, v in os.environ.items() if k not in _LAUNCHER}
    package = str(Path(qaft.__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (package, inherited.get("PYTHONPATH", "")) if p)
    return {**inherited, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _device_for_reload(loaded: LoadedModel, live: torch.device) -> torch.device:
    """Return the run's device when a second model fits beside it, else the CPU."""
    if live.type != "cuda":
        return live
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(live)
    return live if free >= _HEADROOM * _dense_bytes(loaded) else torch.device("cpu")


def _dense_bytes(loaded: LoadedModel) -> int:
    def count(part: Any) -> int:
        return part.numel() if isinstance(part, Tensor) else part.in_features * part.out_features

    return model_dtype(loaded).itemsize * sum(count(part) for _, part in model_parts(loaded.model))
