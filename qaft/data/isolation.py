"""Does this model, as it is loaded, keep the samples of a packed row apart? Three small forward passes tell.

The packing itself cannot know: flash attention with several rows, a custom attention function, a recurrent layer or a
cache let samples see each other, and the loss still falls.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from qaft.data.batches import Batch, make_batch
from qaft.data.files import Provenance
from qaft.data.samples import Sample
from qaft.errors import IncompatibleError
from qaft.layers.mode import evaluating

SAMPLE_TOKENS = 8
"""Length of the probe samples: two fill a row."""

NOISE_FACTOR = 4.0
"""A leak has to exceed the difference between two equal passes (0 on most hardware) by this factor."""


def check_isolation(model: nn.Module, *, vocab_size: int) -> None:
    """Return when the logits of a packed sample do not depend on the sample before it.

    Args:
        model: called as ``model(**Batch.inputs())``, returns an output with ``logits`` [B, T, vocab]. It is put into
            evaluation mode for the check and back.
        vocab_size: token ids of the probes are below it.

    Raises:
        IncompatibleError: they depend on it, so packing would train every sample on its neighbour.
    """
    with evaluating(model):
        first = _second_samples(model, vocab_size, shift=0)
        again = _second_samples(model, vocab_size, shift=0)
        other = _second_samples(model, vocab_size, shift=1)
    noise = float((first - again).abs().max())
    leak = float((first - other).abs().max())
    if not leak <= NOISE_FACTOR * noise:
        raise IncompatibleError(
            "data.packing=true: with this model a packed sample sees the one before it (another first sample moves the "
            f"logits of the second by {leak:.2g}); set data.packing: false, or model.attention: sdpa"
        )


@torch.no_grad()
def _second_samples(model: nn.Module, vocab_size: int, *, shift: int) -> Tensor:
    """Return the logits of the second samples of two rows, [2, SAMPLE_TOKENS, vocab], float64."""
    batch = _probe(vocab_size, shift).to(next(model.parameters()).device)
    return model(**batch.inputs()).logits[:, SAMPLE_TOKENS:].double()


def _probe(vocab_size: int, shift: int) -> Batch:
    def sample(begin: int) -> Sample:
        ids = np.arange(begin, begin + SAMPLE_TOKENS, dtype=np.int32) % vocab_size
        return Sample(ids, ids, Provenance("isolation probe", begin))

    rows = [[sample(row + shift), sample(row + SAMPLE_TOKENS)] for row in range(2)]
    return make_batch(rows, 2 * SAMPLE_TOKENS, pad_id=0, num_targets=sum(s.num_targets for s in chain(*rows)), step=0)
