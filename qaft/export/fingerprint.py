"""``qaft_check.json``: what the exported model answered, in 17 numbers per token, so that a copy can be checked later.

Per token of a few prompts: the largest logits with their token ids, and the log of the sum of all exponentials. From
these follow, for another model, the largest relative difference on these logits, whether the most likely token is the
same, and the KL divergence between the two distributions over these tokens and "any other": never more than the KL over
the whole vocabulary (data processing inequality), and near it, because the largest logits hold most of the mass.

Shapes: T = tokens of a prompt, V = vocabulary, K = ``TOP``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qaft.errors import ExportError
from qaft.evaluate.difference import PromptLogits

FINGERPRINT = "qaft_check.json"

TOP = 16
"""Logits kept per token."""


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What a model answers, by prompt.

    Attributes:
        ids: the prompts, int64 [T].
        top: the most likely next tokens, int64 [T, K].
        logits: their logits, fp64 [T, K].
        total: log of the sum of the exponentials of all logits, fp64 [T].
        device: type of the device that computed them, as ``torch.device`` names it.
    """

    ids: tuple[Tensor, ...]
    top: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    total: tuple[Tensor, ...]
    device: str

    @classmethod
    def of(cls, answered: PromptLogits, *, device: str) -> Fingerprint:
        """Return the fingerprint of a model's logits, computed on this type of device."""
        found = [logits.double().topk(min(TOP, logits.shape[1])) for logits in answered.logits]
        return cls(
            ids=answered.ids,
            top=tuple(f.indices for f in found),
            logits=tuple(f.values for f in found),
            total=tuple(logits.double().logsumexp(1) for logits in answered.logits),
            device=device,
        )

    def save(self, path: Path) -> None:
        """Write the fingerprint as JSON; numbers are written so that they are read back exactly."""
        values = {name: [t.tolist() for t in getattr(self, name)] for name in ("ids", "top", "logits", "total")}
        path.write_text(json.dumps({"device": self.device, **values}) + "\n", encoding="utf-8")

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: Path) -> Fingerprint:
        """Return the fingerprint in what ``save`` has written, given the file that it was read from for the message.

        Raises:
            ExportError: something is missing or damaged.
        """
        try:
            integers = [tuple(torch.tensor(v, dtype=torch.int64) for v in values[name]) for name in ("ids", "top")]
            reals = [tuple(torch.tensor(v, dtype=torch.float64) for v in values[name]) for name in ("logits", "total")]
            return cls(*integers, *reals, device=values["device"])
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{where}: is no record of an exported model ({error}); export the run again") from error

    @classmethod
    def load(cls, path: Path) -> Fingerprint:
        """Read a fingerprint.

        Raises:
            ExportError: the file is missing or damaged.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportError(f"{path}: is no record of an exported model ({error}); export the run again") from error
        return cls.from_values(values, path)

    def compare(self, answered: PromptLogits) -> Deviation:
        """Return how far another model's logits on the same prompts are from these.

        Raises:
            ExportError: its vocabulary is smaller.
        """
        if max(int(top.max()) for top in self.top) >= answered.logits[0].shape[1]:
            raise ExportError("the vocabulary is smaller than that of the model that was exported")
        deviations = [
            _deviation(top, logits, total, theirs.double())
            for top, logits, total, theirs in zip(self.top, self.logits, self.total, answered.logits, strict=True)
        ]
        relative, divergence, agreed = (torch.cat(parts) for parts in zip(*deviations, strict=True))
        return Deviation(
            max_relative=float(relative.max()),
            kl_mean=float(divergence.mean()),
            top1_agreement=float(agreed.double().mean()),
            num_tokens=len(relative),
        )


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far a model is from a fingerprint.

    Attributes:
        max_relative: largest difference of a recorded logit, relative to its token's largest one.
        kl_mean: KL(recorded || model) over the recorded tokens and all others as one, nats per token.
        top1_agreement: share of tokens with the same most likely next token.
        num_tokens: tokens compared.
    """

    max_relative: float
    kl_mean: float
    top1_agreement: float
    num_tokens: int


def _deviation(top: Tensor, logits: Tensor, total: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return max relative difference, KL and agreement of every token, [T] each."""
    found = theirs.gather(1, top)
    relative = (found - logits).abs().amax(1) / logits.abs().amax(1).clamp_min(torch.finfo(torch.float64).tiny)
    ours, other = _with_rest(logits - total[:, None]), _with_rest(found - theirs.logsumexp(1, keepdim=True))
    divergence = (ours.exp() * (ours - other)).sum(1)
    return relative, divergence, theirs.argmax(1) == top[:, 0]


def _with_rest(log_probs: Tensor) -> Tensor:
    """Return [T, K] log probabilities with that of all other tokens as one more column."""
    rest = (1 - log_probs.exp().sum(1, keepdim=True)).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.cat([log_probs, rest.log()], dim=1)
