"""From examples to samples: tokens, loss mask, end tokens, and what happens to samples that are too long.

What is checked on every sample, because none of it shows in a falling loss:
    some token carries loss, also after the cut at max_length;
    an answer ends with a trained end token, or the model would never stop (a cut sample is counted instead).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from qaft.data.encode import Encoded, TextEncoder, eos_id
from qaft.data.examples import Conversation, Example, Text
from qaft.data.layouts import Layout, pieces
from qaft.data.samples import IGNORE_INDEX, Sample
from qaft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["completion", "all"]
OnLong = Literal["truncate", "split", "drop", "error"]


class Renderer:
    """Turns examples into samples, and counts what it had to change.

    Attributes:
        encoder: the tokenizer with its begin and end tokens.
        lengths: tokens of every sequence before anything is cut or dropped, in order.
        counts: ``truncated`` and ``dropped`` samples, ``split`` texts, ``empty`` texts (skipped), ``rewritten``
            conversations (they became several sequences), ``separate`` sequences (pieces tokenized one by one).
        ends: how many answers end with which token id.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        *,
        max_length: int,
        train_on: TrainOn = "completion",
        on_long: OnLong = "truncate",
    ) -> None:
        self.encoder = TextEncoder(tokenizer)
        self.layout = layout
        self.max_length = max_length
        self.train_on = train_on
        self.on_long = on_long
        self.lengths: list[int] = []
        self.counts: Counter[str] = Counter()
        self.ends: Counter[int] = Counter()

    def render(self, examples: Sequence[Example]) -> list[Sample]:
        """Return the samples of the examples, in order.

        Raises:
            DataError: nothing in a sample carries loss, an answer never ends, or a sample is too long and may not be;
                the message names file and line.
        """
        owners, sequences = [], []
        for example in examples:
            if isinstance(example, Text) and not example.text.strip():
                self.counts["empty"] += 1
                continue
            parts = pieces(example, self.layout)
            if not parts[0]:
                raise DataError(f"{example.source}: prompt and completion are both empty; fill them or remove the row")
            self.counts["rewritten"] += len(parts) > 1
            owners += [example] * len(parts)
            sequences += parts
        encoded = self.encoder.encode(sequences, add_begin=self.layout.adds_specials)
        return [s for example, item in zip(owners, encoded, strict=True) for s in self._samples(example, item)]

    def _samples(self, example: Example, encoded: Encoded) -> list[Sample]:
        ids, trained = encoded.ids, encoded.trained
        self.counts["separate"] += encoded.separate
        eos = eos_id(self.encoder.tokenizer)
        if self.layout.adds_specials and not isinstance(example, Conversation) and eos is not None and ids[-1] != eos:
            ids = np.append(ids, np.int32(eos))
            trained = np.append(trained, True)
        if self.train_on == "all":
            trained = np.ones_like(trained)
        sample = Sample(ids, np.where(trained, ids, IGNORE_INDEX), example.source)
        if not sample.num_targets:
            raise DataError(
                f"{example.source}: no token carries loss, so there is nothing to learn; "
                "add an assistant turn (with a weight that is not 0) or remove the row"
            )
        if not isinstance(example, Text):
            self._check_end(sample)
        self.lengths.append(len(sample))
        return [sample] if len(sample) <= self.max_length else self._shorten(sample)

    def _check_end(self, sample: Sample) -> None:
        targets = sample.labels != IGNORE_INDEX
        # The last token of every trained stretch: an answer that ends with a special token ends the generation.
        closing = np.flatnonzero(targets & ~np.append(targets[1:], False))
        for end in closing:
            begin = end - int(np.argmin(targets[: end + 1][::-1])) + 1
            position = self.encoder.end_position(sample.input_ids[begin : end + 1])
            if position is not None:
                self.ends[int(sample.input_ids[begin + position])] += 1
                return
        raise DataError(
            f"{sample.source}: no end token is trained, the model would never stop; "
            f"the sample ends with {self.encoder.tokenizer.decode(sample.input_ids[-8:].tolist())!r}; "
            "repair the chat template (it must close an assistant turn) or set data.chat_template to plain"
        )

    def _shorten(self, sample: Sample) -> list[Sample]:
        where = f"{sample.source}: {len(sample)} tokens do not fit into data.max_length={self.max_length}"
        if self.on_long == "error":
            raise DataError(f"{where}; raise it, or set data.on_long to truncate or drop")
        if self.on_long == "drop":
            self.counts["dropped"] += 1
            return []
        if self.on_long == "split":
            self.counts["split"] += 1
            return self._windows(sample)
        kept = slice(self.max_length)
        cut = Sample(sample.input_ids[kept], sample.labels[kept], sample.source, truncated=True)
        if not cut.num_targets:
            raise DataError(
                f"{where}, and the prompt alone fills it: nothing would be learned; "
                "raise data.max_length, or set data.on_long to drop"
            )
        self.counts["truncated"] += 1
        return [cut]

    def _windows(self, sample: Sample) -> list[Sample]:
        # Windows share one token, because the first of a window is not predicted: so every token is a target once.
        step = self.max_length - 1
        windows = (slice(i, i + self.max_length) for i in range(0, len(sample) - 1, step))
        return [Sample(sample.input_ids[w], sample.labels[w], sample.source) for w in windows]
