"""Reload an export in a fresh process with plain transformers, and compare its fp32 logits with the live run's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qaft
from qaft.errors import ExportError
from qaft.evaluate.difference import Difference, PromptLogits, compare_logits, prompt_ids
from qaft.evaluate.float32 import float_logits, native_logits
from qaft.export.answer import CODES, INPUTS, NATIVE, PLAIN, PLAIN_CODES, part_of
from qaft.export.base import Linear, Written
from qaft.export.measured import Native
from qaft.export.sites import code_flips, input_codes, record_inputs
from qaft.export.tensors import linear_layers, model_dtype, model_parts
from qaft.layers.activations import plain_activations
from qaft.layers.attach import replace_module
from qaft.layers.inputs import input_of, put_before

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that would make the fresh process wait for its siblings."""

_HEADROOM = 1.5
"""Free memory needed for a second model, relative to its weights: activations, and one layer in fp32."""

_HOST_HEADROOM = 1.2
"""The same in host memory, where nothing is fragmented."""


@dataclass(frozen=True)
class Verification:
    """What a reload has shown.

    Attributes:
        difference: the reload against the reference.
        rounding: the reference against the run, if they differ.
        reference: the logits that the export has to give.
        native: what 16 bits make of it, where the export is in the 16 bits of the run.
        flips: share of other input codes by layer; empty without quantized inputs.
        plain: the reload as transformers itself runs it, where that is another function than the trained one.
    """

    difference: Difference
    rounding: Difference | None
    reference: PromptLogits
    native: Native | None = None
    flips: Mapping[str, float] = field(default_factory=dict)
    plain: Plain | None = None

    def notes(self) -> tuple[str, ...]:
        """Return what was measured beside the difference, in sentences."""
        notes = []
        if self.native is not None:
            notes.append(
                f"in 16 bits: KL {self.native.reload:.1e} nats from the run in 32 bits; that of the run itself in 16 "
                f"bits is {self.native.run:.1e}"
            )
        if self.flips:
            worst = max(self.flips, key=self.flips.__getitem__)
            notes.append(f"codes of inputs that differ: at most {self.flips[worst]:.2%} of a layer's ({worst})")
        if self.plain is not None:
            notes.append(
                "transformers with compressed-tensors divides inputs by max / (q_max + 1/2), the kernels that the run "
                f"was trained for by max / q_max: there {self.plain.flips:.1%} of the codes of inputs differ, KL "
                f"{self.plain.difference.kl_mean:.1e} nats, same top token {self.plain.difference.top1_agreement:.1%}"
            )
        return tuple(notes)


@dataclass(frozen=True)
class Plain:
    """``difference`` of logits to the reference, and ``flips``, the share of other input codes over all layers."""

    difference: Difference
    flips: float


@dataclass(frozen=True, eq=False)
class Reloaded(PromptLogits):
    """What a fresh process has answered; see ``answer.py``.

    Attributes:
        native: logits in the 16 bits of the checkpoint; empty in 32.
        codes: integers of the recorded inputs, by layer.
        plain: logits as transformers itself computes them, where its server has another function.
        plain_codes: integers as transformers itself computes them.
    """

    native: tuple[Tensor, ...] = ()
    codes: Mapping[str, Tensor] = field(default_factory=dict)
    plain: tuple[Tensor, ...] = ()
    plain_codes: Mapping[str, Tensor] = field(default_factory=dict)


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
            if (inputs := input_of(layer)) is not None:
                put_before(bind, inputs)
            replace_module(model, name, bind)
        yield
    finally:
        for name, layer in layers.items():
            replace_module(model, name, layer)


def verify_export(loaded: LoadedModel, folder: Path, written: Written) -> Verification:
    """Return how far the export in ``folder`` is from what it should be.

    Activations are those that the export speaks of: inputs are quantized on both sides where its configuration says so,
    the KV cache, which is the server's, on neither.

    Raises:
        ExportError: plain transformers cannot load it.
        DifferenceError: it differs by more than ``written.bound``.
    """
    trained, reference = expected_logits(loaded, written)
    ids, own = reference.ids, None
    with plain_activations(loaded.model, keep_inputs=written.inputs is not None):
        if reference is trained and written.base is None and written.dtype == model_dtype(loaded) != torch.float32:
            own = PromptLogits(ids, native_logits(loaded.model, ids))
        inputs = {} if written.inputs is None else record_inputs(loaded.model, ids[0])
        codes = input_codes(loaded.model, inputs)
    live = next(loaded.model.parameters()).device
    device = _device_for_reload(loaded, live)
    dtype = None if written.base is None else model_dtype(loaded)
    reloaded = reload_logits(folder, ids, device=device, base=written.base, dtype=dtype, inputs=inputs)
    found = Verification(
        compare_logits(reference, reloaded),
        None if reference is trained else compare_logits(trained, reference),
        reference,
        native=None if own is None or not reloaded.native else _native(reference, own, reloaded),
        flips=code_flips(codes, reloaded.codes),
        plain=_plain(reference, codes, reloaded) if reloaded.plain else None,
    )
    bound = written.bound.between(live.type, device.type)
    bound.check(found.difference)
    bound.check_codes(found.flips)
    if found.native is not None:
        bound.check_floor(found.native.reload, found.native.run)
    return found


def expected_logits(loaded: LoadedModel, written: Written) -> tuple[PromptLogits, PromptLogits]:
    """Return the fp32 logits of the trained model, and those that its export has to give: the same, where it can."""
    ids = prompt_ids(loaded.tokenizer)
    with plain_activations(loaded.model, keep_inputs=written.inputs is not None):
        trained = PromptLogits(ids, float_logits(loaded.model, ids))
        if written.exported_weight is None:
            return trained, trained
        with exported_weights(loaded.model, written.exported_weight, written.dtype):
            return trained, PromptLogits(ids, float_logits(loaded.model, ids, via=written.dtype))


def missing_memory(loaded: LoadedModel) -> str:
    """Return why a fresh process cannot hold the model beside the run, with both numbers; empty where it can."""
    live = next(loaded.model.parameters()).device
    needed, free = _HOST_HEADROOM * _dense_bytes(loaded), psutil.virtual_memory().available
    if _device_for_reload(loaded, live).type != "cpu" or free >= needed:
        return ""
    return f"a fresh process needs {needed / 2**30:.1f} GiB for it, {free / 2**30:.1f} are free"


def _native(reference: PromptLogits, own: PromptLogits, reloaded: Reloaded) -> Native:
    theirs = PromptLogits(reference.ids, reloaded.native)
    return Native(compare_logits(reference, own).kl_mean, compare_logits(reference, theirs).kl_mean)


def _plain(reference: PromptLogits, codes: Mapping[str, Tensor], reloaded: Reloaded) -> Plain:
    differing = sum(int((codes[name] != other).sum()) for name, other in reloaded.plain_codes.items())
    total = sum(other.numel() for other in reloaded.plain_codes.values())
    return Plain(compare_logits(reference, PromptLogits(reference.ids, reloaded.plain)), differing / max(1, total))


def reload_logits(
    folder: Path,
    ids: Sequence[Tensor],
    *,
    device: torch.device | str = "cpu",
    base: Path | None = None,
    dtype: torch.dtype | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Reloaded:
    """Return the fp32 logits of an exported folder, computed by a fresh process that loads it without qaft.

    What transformers leaves out or computes otherwise than the folder's server (``models/served.py``) is put in after
    it has loaded the model.

    Args:
        folder: the export.
        ids: prompts, int64 [T].
        device: where the process computes.
        base: for an adapter, the folder of its model.
        dtype: dtype in which ``base`` is loaded; None for the checkpoint's own.
        inputs: what layers of the trained model have read, fp32 [T, I], to be answered by codes.

    Raises:
        ExportError: the process failed; the message ends with its last line.
    """
    # Zero-padded: safetensors sorts by name.
    request = {f"{i:04d}": tokens for i, tokens in enumerate(ids)}
    with tempfile.TemporaryDirectory(prefix="qaft-verify-") as scratch:
        question, answer = Path(scratch, "ids.safetensors"), Path(scratch, "logits.safetensors")
        save_file({**request, **{INPUTS + name: x for name, x in (inputs or {}).items()}}, question)
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
    return Reloaded(
        tuple(ids),
        tuple(found[name] for name in request),
        native=tuple(part_of(found, NATIVE).values()),
        codes=part_of(found, CODES),
        plain=tuple(part_of(found, PLAIN).values()),
        plain_codes=part_of(found, PLAIN_CODES),
    )


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
