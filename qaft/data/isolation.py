"""Does this model, as it is loaded, keep apart what shares a row? A few small forward passes tell.

What makes the row cannot know: flash attention with several rows, a custom attention function, a recurrent layer or a
cache let samples or options see each other, and the loss still falls.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qaft.data.batches import Batch, make_batch
from qaft.data.files import Provenance
from qaft.data.options import OptionsSample
from qaft.data.options_batch import make_options_batch
from qaft.data.samples import Sample
from qaft.errors import IncompatibleError
from qaft.layers.mode import evaluating
from qaft.models.tree_mask import check_tree_attention, tree_mask

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
    noise, leak = _noise_and_change(model, lambda shift: _second_samples(model, vocab_size, shift=shift))
    if not leak <= NOISE_FACTOR * noise:
        raise IncompatibleError(
            "data.packing=true: with this model a packed sample sees the one before it (another first sample moves the "
            f"logits of the second by {leak:.2g}); set data.packing: false, or model.attention: sdpa"
        )


def check_options(model: Any, *, vocab_size: int, max_length: int) -> None:
    """Return when an option depends on the prompt and its place after it, and not on the option written before it.

    Args:
        model: a transformers causal LM. It is put into evaluation mode for the check and back.
        vocab_size: token ids of the probes are below it.
        max_length: longest row that will be given.

    Raises:
        IncompatibleError: options of several tokens cannot be scored from one prompt with this model.
    """
    check_tree_attention(model, max_length=max_length)
    what = "data.classification.loss=options with options of several tokens: with this model"
    way_out = "set data.classification.loss: answer, or verbalizers that differ in their last token alone"
    noise, leak = _noise_and_change(model, lambda shift: _second_options(model, vocab_size, first=shift))
    if not leak <= NOISE_FACTOR * noise:
        raise IncompatibleError(
            f"{what} an option sees the one before it (another first option moves the logits of the second by "
            f"{leak:.2g}); {way_out}"
        )
    for name in ("prompt", "position"):
        noise, move = _noise_and_change(
            model, lambda shift, name=name: _second_options(model, vocab_size, **{name: shift})
        )
        if not move > NOISE_FACTOR * noise:
            raise IncompatibleError(
                f"{what} the {name} of the second option changes nothing in it, so that it would be scored as if it "
                f"stood elsewhere; {way_out}"
            )


def _noise_and_change(model: nn.Module, logits: Callable[[int], Tensor]) -> tuple[float, float]:
    """Return how much logits(0) differ between two passes, and how much from logits(1), as the largest difference."""
    with evaluating(model):
        first, again, other = logits(0), logits(0), logits(1)
    return float((first - again).abs().max()), float((first - other).abs().max())


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


@torch.no_grad()
def _second_options(model: Any, vocab_size: int, *, prompt: int = 0, first: int = 0, position: int = 0) -> Tensor:
    """Return the logits at the second option of two rows, [2, SAMPLE_TOKENS, vocab], float64.

    Args:
        model: the model.
        vocab_size: token ids are below it.
        prompt: added to the tokens of the prompt.
        first: added to the tokens of the first option.
        position: added to the positions of the second option.
    """

    def tokens(begin: int, count: int) -> tuple[int, ...]:
        return tuple((begin + i) % vocab_size for i in range(count))

    def sample(row: int) -> OptionsSample:
        # One token more than the row holds of an option: the last is only predicted. No change makes them begin alike.
        options = tokens(row + 1 + first, SAMPLE_TOKENS + 1), tokens(row + SAMPLE_TOKENS, SAMPLE_TOKENS + 1)
        return OptionsSample(tokens(row + prompt, SAMPLE_TOKENS), options, 0, Provenance("isolation probe", row + 1))

    rows = [[sample(row)] for row in range(2)]
    batch = make_options_batch(rows, 3 * SAMPLE_TOKENS, pad_id=0, num_targets=len(rows), step=0)
    assert batch.branches is not None
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids + position * (batch.branches == 2)}
    device = next(model.parameters()).device
    mask = tree_mask(model, batch.branches.to(device))
    output = model(**{k: v.to(device) for k, v in inputs.items()}, attention_mask=mask, use_cache=False)
    return output.logits[:, 2 * SAMPLE_TOKENS :].double()
