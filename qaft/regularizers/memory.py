"""What a model computed at the targets of each sample when it saw the sample last.

Hidden states are kept, H values a target on the CPU: through a head that is not trained they give the same logits, of
which there are V. A sample is known by its tokens up to its last target and by its targets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class TargetMemory:
    """Hidden states by sample; those of a step are remembered from the next step on.

    A step that is broken off and run again (accumulation, a signal) therefore finds what it found the first time.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] = {}
        self._step = -1

    def exchange(self, input_ids: Tensor, labels: Tensor, hidden: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Keep ``hidden`` for later steps and return what earlier steps have left.

        Args:
            input_ids: [B, T].
            labels: [B, T], not shifted; negative where there is no loss.
            hidden: [N, H] at the targets, row after row.
            step: index of the optimizer step.

        Returns:
            Hidden states of earlier steps [N, H], zeros where there are none, and whether there are any [N].
        """
        self._begin(step)
        counts = (labels[:, 1:] >= 0).sum(1).tolist()
        before, known = torch.zeros_like(hidden), torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        end = 0
        for row, count in enumerate(counts):
            start, end = end, end + count
            key = _key(input_ids[row], labels[row])
            if count and key in self._kept:
                before[start:end], known[start:end] = self._kept[key].to(hidden), True
            if count:
                self._new[key] = hidden[start:end].detach().cpu().clone()
        return before, known

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return what step ``step`` will find, as plain values and one tensor."""
        self._begin(step)
        rows = list(self._kept.values())
        return {
            "samples": list(self._kept),
            "counts": [len(row) for row in rows],
            "states": torch.cat(rows) if rows else torch.zeros(0, 1),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        rows = state["states"].split(list(state["counts"]))
        self._kept, self._new, self._step = dict(zip(state["samples"], rows, strict=True)), {}, -1

    def _begin(self, step: int) -> None:
        if step != self._step:
            if step > self._step:
                self._kept |= self._new
            self._new, self._step = {}, step


def _key(input_ids: Tensor, labels: Tensor) -> str:
    targets = (labels >= 0).nonzero().flatten()
    end = int(targets[-1]) + 1 if len(targets) else 0
    # What follows the last target (padding, its length) is not seen by any.
    seen = torch.stack([input_ids[:end], labels[:end]]).cpu().contiguous()
    return hashlib.blake2b(seen.numpy().tobytes(), digest_size=16).hexdigest()
