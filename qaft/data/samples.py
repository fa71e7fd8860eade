"""A tokenized sample: its ids, which of them carry loss, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qaft.data.files import Provenance

IGNORE_INDEX = -100
"""The label of a position without loss; the default of ``torch.nn.functional.cross_entropy``."""

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sequence that never sees another.

    law:  labels[0] == IGNORE_INDEX, because nothing precedes the first token. So the number of labels that are not
          IGNORE_INDEX is exactly the number of positions with loss, also after the shift by one in the loss.

    Attributes:
        input_ids: [n] int32.
        labels: [n] int32, aligned with input_ids (the loss shifts), IGNORE_INDEX where there is no loss.
        source: where the row stands.
        truncated: the end was cut off at max_length.
    """

    input_ids: Ids
    labels: Ids
    source: Provenance
    truncated: bool = False

    def __post_init__(self) -> None:
        # Copies: a view would keep alive what was cut off.
        input_ids = np.array(self.input_ids, dtype=np.int32)
        labels = np.array(self.labels, dtype=np.int32)
        if input_ids.ndim != 1 or input_ids.shape != labels.shape or not len(labels):
            shapes = f"input_ids {input_ids.shape} and labels {labels.shape}"
            raise ValueError(f"{self.source}: {shapes} must both be [n] with n >= 1")
        labels[0] = IGNORE_INDEX
        object.__setattr__(self, "input_ids", input_ids)
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Return the number of positions that contribute loss."""
        return int(np.count_nonzero(self.labels != IGNORE_INDEX))
