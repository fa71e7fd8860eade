"""What two models are compared by: logits in 32 and in 16 bits, and the integers of quantized inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qaft.evaluate.difference import Difference, PromptLogits, compare_logits
from qaft.evaluate.float32 import float_logits, native_logits
from qaft.export.base import Bound
from qaft.export.fingerprint import Deviation
from qaft.export.sites import code_flips, input_codes, record_inputs


@dataclass(frozen=True, eq=False)
class Measured:
    """A model's answers.

    Attributes:
        logits: formed in fp32.
        native: formed in the 16 bits of the model; None in 32.
        inputs: what layers with quantized inputs have read, fp32 [T, I].
        codes: the integers of these, int16 [T, I].
    """

    logits: PromptLogits
    native: PromptLogits | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    codes: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Native:
    """KL in nats per token to the run in 32 bits: of the ``run`` in 16 bits, and of the ``reload`` in 16 bits."""

    run: float
    reload: float


@dataclass(frozen=True)
class Comparison:
    """How far a model is from a run.

    Attributes:
        difference: of the logits in 32 bits.
        native: of those in 16 bits; None where one of the models has none.
        flips: share of other input codes by layer; empty without quantized inputs.
    """

    difference: Difference
    native: Native | None
    flips: Mapping[str, float]


def measure(model: Any, ids: tuple[Tensor, ...], *, inputs: Mapping[str, Tensor] | None = None) -> Measured:
    """Return the answers of a live model.

    Args:
        model: a transformers causal LM.
        ids: prompts, int64 [T].
        inputs: what the layers of the model that it is compared with have read; None to record its own.
    """
    native = None if model.dtype == torch.float32 else PromptLogits(ids, native_logits(model, ids))
    seen = record_inputs(model, ids[0]) if inputs is None else inputs
    return Measured(PromptLogits(ids, float_logits(model, ids)), native, seen, input_codes(model, seen))


def compare_measured(run: Measured, reload: Measured) -> Comparison:
    """Return how far ``reload`` is from ``run``."""
    native = None
    if run.native is not None and reload.native is not None:
        own, other = (compare_logits(run.logits, found).kl_mean for found in (run.native, reload.native))
        native = Native(own, other)
    return Comparison(compare_logits(run.logits, reload.logits), native, code_flips(run.codes, reload.codes))


@dataclass(frozen=True)
class Verdict:
    """``value`` is what was measured of ``name``, ``limit`` what an export's bound allows."""

    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        """Return whether the value is within the limit, which nothing is that is no number."""
        return self.value <= self.limit

    def __str__(self) -> str:
        """Return the verdict as a line."""
        outcome = "holds" if self.holds else "EXCEEDED"
        return f"{self.name}: {self.value:.2e}, allowed {self.limit:.2e}: {outcome}"


def verdicts(bound: Bound, found: Comparison) -> list[Verdict]:
    """Return a verdict for every limit of the bound of an export to its run."""
    limits = logit_verdicts(bound, found.difference)
    if found.flips and bound.flips is not None:
        limits.append(Verdict("codes of inputs that differ, of a layer", max(found.flips.values()), bound.flips))
    if found.native is not None and bound.floor is not None:
        limits.append(Verdict("KL in 16 bits, nats", found.native.reload, bound.floor_of(found.native.run)))
    return limits


def logit_verdicts(bound: Bound, found: Difference | Deviation) -> list[Verdict]:
    """Return a verdict for every limit of logits in 32 bits, of whichever answers an export is compared with."""
    rows = (
        ("max relative logit difference", found.max_relative, bound.max_relative),
        ("KL in 32 bits, nats", found.kl_mean, bound.kl_mean),
    )
    return [Verdict(name, value, limit) for name, value, limit in rows if limit is not None]
