"""What every exporter takes and returns.

an exporter writes into a folder that does not exist yet; the folder appears complete and checked, or not at all
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from qaft.bases.base import FrozenLinear
from qaft.errors import DifferenceError
from qaft.evaluate.difference import Difference
from qaft.export.fingerprint import Deviation
from qaft.layers.adapted import AdaptedLinear

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel
    from qaft.sections import ExportSection

Linear = AdaptedLinear | FrozenLinear
"""A linear layer of a loaded model: trained, or frozen."""

InputFunction = Literal["vllm", "compressed-tensors"]
"""Whose function rounds the inputs of layers: that of vLLM's integer kernels, or the one that transformers runs."""


@dataclass(frozen=True, kw_only=True)
class ExportInfo:
    """What an export says about its origin.

    Attributes:
        recipe: the resolved recipe as plain values.
        base: what the base model is called: hub id or folder.
        command: the command line that wrote the export.
        metrics: name -> value, for the model card.
        notes: what was done to the model before it was written, which the user has to know.
        trained: False for the model of a recipe as it is before training.
    """

    recipe: Mapping[str, Any]
    base: str
    command: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    trained: bool = True


@dataclass(frozen=True, kw_only=True)
class Bound:
    """How far a reloaded export may be from the trained model.

    Attributes:
        max_relative: limit of ``Difference.max_relative``, or None.
        kl_mean: limit of ``Difference.kl_mean`` in nats, or None.
        floor: limit of the reload's KL in its own 16 bits, in units of that of the run in 16 bits; both against the run
            in 32 bits. None for no limit.
        flips: limit of the share of other input codes at every layer with quantized inputs, or None.
        reason: what the limit allows for.
    """

    max_relative: float | None = None
    kl_mean: float | None = None
    floor: float | None = None
    flips: float | None = None
    reason: str

    def check(self, difference: Difference | Deviation, *, consequence: str = "nothing was written") -> None:
        """Raise when the difference exceeds the bound; a value that is not a number exceeds every bound.

        Args:
            difference: what was measured.
            consequence: how the message ends.

        Raises:
            DifferenceError: the message holds what was measured and what is allowed.
        """
        for name, limit in (("max_relative", self.max_relative), ("kl_mean", self.kl_mean)):
            measured = getattr(difference, name)
            if limit is not None and not measured <= limit:
                raise DifferenceError(
                    f"the reloaded export is not the trained model: {name}={measured:.3g}, allowed {limit:.3g} "
                    f"({self.reason}); top-1 agreement {difference.top1_agreement:.1%}; {consequence}"
                )

    def between(self, answered: str, reloaded: str) -> Bound:
        """Return the bound to answers of one type of device where a reload computes on another; see ``OTHER_DEVICE``.

        A limit of KL alone stays: it allows for more than that.

        Args:
            answered: type of the device that the recorded answers come from, as ``torch.device`` names it.
            reloaded: type of the device of the reload.
        """
        if answered == reloaded or self.max_relative is None or self.max_relative >= OTHER_DEVICE:
            return self
        other = f"answered on {answered}, reloaded on {reloaded}, whose kernels sum in other orders"
        return replace(self, max_relative=OTHER_DEVICE, reason=f"{self.reason}; {other}")

    def check_codes(self, flips: Mapping[str, float]) -> None:
        """Raise when more codes of a layer's inputs differ than the bound allows.

        Args:
            flips: layer -> share of codes that differ.

        Raises:
            DifferenceError: the message names the layer.
        """
        for name, share in flips.items():
            if self.flips is not None and not share <= self.flips:
                raise DifferenceError(
                    f"the reloaded export quantizes inputs of {name} otherwise than the trained model: {share:.2%} of "
                    f"the codes differ, allowed {self.flips:.0%}; nothing was written"
                )

    def floor_of(self, run: float) -> float:
        """Return the KL that a reload in 16 bits may have, given that of the run itself in 16 bits."""
        return (self.floor or math.inf) * max(run, SMALLEST_FLOOR)

    def check_floor(self, reload: float, run: float) -> None:
        """Raise when the reload in 16 bits is farther from the run in 32 than the bound allows.

        Args:
            reload: KL of the reload in 16 bits, nats per token.
            run: KL of the run itself in 16 bits.

        Raises:
            DifferenceError: the message holds both.
        """
        if self.floor is not None and not reload <= self.floor_of(run):
            raise DifferenceError(
                f"the reloaded export in 16 bits is {reload:.2e} nats per token from the run in 32 bits, and the run "
                f"itself in 16 bits {run:.2e}: allowed is {self.floor:g} times that; nothing was written"
            )


SMALLEST_FLOOR = 1e-7
"""KL in nats below which two models in 16 bits are alike: the rounding of fp32 logits shows in it."""

EXACT = Bound(max_relative=1e-5, floor=2.0, reason="equal weights, fp32 sums in another order")
"""The exported weights are the live ones: measured 0, and 3e-6 for fp32 weights in the original basis."""

OTHER_DEVICE = 1e-4
"""``max_relative`` of equal weights on two types of devices, whose kernels add the same fp32 products in other orders.

Rounding errors of n additions that do not know of each other grow as sqrt(n) 2^-24, and those of 2 L sums into one
residual stream as sqrt(2 L): 6e-5 for n = 14336 and L = 32, the widest sums of 8B models. Measured on a CPU with 135
million weights: 3e-6 between fp32 and fp64, so at most twice that between two orders, and 0 between one thread and two.
"""

FLIPPING = Bound(
    kl_mean=1e-3,
    floor=2.0,
    flips=0.01,
    reason="equal weights and codes of inputs, but where fp32 sums in another order cross a rounding boundary",
)
"""As EXACT where inputs are quantized: measured 0 on CPUs, where the sums have one order."""

FLOOR_16BIT = Bound(kl_mean=1e-3, reason="rounded to 16 bits once more, in another basis")
"""A 260k-parameter Llama trained on stories: 2.6e-4 nats per token in bf16, 4e-6 in fp16."""

UNBOUNDED = Bound(reason="not the trained function by construction")


@dataclass(frozen=True, kw_only=True)
class Written:
    """What an exporter wrote into its folder, and what a reload has to equal.

    Attributes:
        dtype: dtype of the tensors that are not packed.
        bound: the allowed difference between the reload and the reference.
        exported_weight: the effective weight [O, I] that the export holds for a layer, where it differs from what the
            live forward uses; None: the reference is the live forward itself.
        basis: basis of the weights, ``fused`` or ``original``.
        grids: one description per grid in the file, empty for plain weights.
        base: for adapters, the folder of the model that they are loaded on.
        inputs: whose function rounds the inputs of layers as the file says; None: it says nothing of inputs.
        vllm_only: whether transformers would compute something else, without an error.
        unloadable: why no program can load the folder by itself; empty where one can.
        notes: what the user has to know.
    """

    dtype: torch.dtype
    bound: Bound
    exported_weight: Callable[[str, Linear], Tensor] | None = None
    basis: str = "fused"
    grids: tuple[Mapping[str, Any], ...] = ()
    base: Path | None = None
    inputs: InputFunction | None = None
    vllm_only: bool = False
    unloadable: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """A finished export.

    Attributes:
        folder: where it is.
        files: names in the folder.
        sizes: name -> bytes.
        notes: what the user has to know.
        difference: the reload against what was exported; None when it was not verified.
        rounding: what was exported against what was trained, where the two differ (merging in 16 bits), else None.
    """

    folder: Path
    files: tuple[str, ...]
    sizes: Mapping[str, int]
    notes: tuple[str, ...]
    difference: Difference | None = None
    rounding: Difference | None = None


class Exporter(Protocol):
    """Writes one format."""

    def __call__(self, loaded: LoadedModel, section: ExportSection, folder: Path, info: ExportInfo) -> ExportReport:
        """Write ``loaded`` (with its adapted layers) as ``section`` asks into the new folder ``folder``.

        Raises:
            ExportError: the folder exists, or the format cannot hold this model; the message names those that can.
            DifferenceError: the reload differs by more than its bound.
        """
        ...
