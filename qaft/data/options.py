"""A classification row as one sequence: the prompt once, then every option beside the others.

    row:    stem | ending 1 without its last token | ending 2 without its last token | ...
    stem:   the prompt and what all options begin with; it has the same probability in all of them
    loss:   -log softmax_k(score(k))[label],    score(k) = sum over ending k of log p(token | stem, tokens before it)

The last token of an ending is predicted and never read, so that options which differ in their last token alone need
no place of their own: the row is the stem.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from qaft.data.files import Provenance
from qaft.data.items import ClassificationItem, items_of
from qaft.data.load import DataSet, LoadedSamples, Which
from qaft.errors import DataError
from qaft.sections import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class OptionsSample:
    """A prompt, the options that can follow it, and which of them does; it is one target.

    Attributes:
        prompt_ids: at least one token.
        option_ids: at least two, all different, of at least one token each.
        label: index of the right option.
        source: where the row stands.

    Raises:
        DataError: the tokens cannot be scored, or two options have the same.
    """

    prompt_ids: Tokens
    option_ids: tuple[Tokens, ...]
    label: int
    source: Provenance

    def __post_init__(self) -> None:
        what = f"{self.source}: data.classification.loss=options"
        if not self.prompt_ids:
            raise DataError(f"{what}: the prompt has no token, so nothing predicts the options; write one")
        if len(self.option_ids) < 2 or not 0 <= self.label < len(self.option_ids):
            raise DataError(
                f"{what}: option {self.label} of {len(self.option_ids)} is no choice; there must be at least two, and "
                "the right one among them"
            )
        for number, option in enumerate(self.option_ids):
            if not option:
                raise DataError(f"{what}: option {number} has no token; give its class another verbalizer")
            if option in self.option_ids[:number]:
                same = self.option_ids.index(option)
                raise DataError(
                    f"{what}: options {same} and {number} are the same tokens {list(option)} to this tokenizer; give "
                    "one of the classes another verbalizer"
                )

    def __len__(self) -> int:
        """Return the number of tokens of the row."""
        return len(self.stem) + sum(len(ending) - 1 for ending in self.endings)

    @property
    def num_targets(self) -> int:
        """Return 1: one choice is made, however many tokens are predicted for it."""
        return 1

    @property
    def stem(self) -> Tokens:
        """Return the prompt and what all options begin with."""
        return (*self.prompt_ids, *self.option_ids[0][: self._num_common])

    @property
    def endings(self) -> tuple[Tokens, ...]:
        """Return what each option has after the common beginning, at least one token."""
        return tuple(option[self._num_common :] for option in self.option_ids)

    @property
    def is_tree(self) -> bool:
        """Return whether options stand beside each other in the row, and must not see each other."""
        return any(len(ending) > 1 for ending in self.endings)

    @property
    def _num_common(self) -> int:
        # Without their last tokens: an option that is the beginning of another still has to be predicted.
        columns = zip(*(option[:-1] for option in self.option_ids), strict=False)
        return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))


def load_options(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, which: Which
) -> LoadedSamples[OptionsSample]:
    """Return the training or validation rows of a classification set with all their options.

    Nothing of a row that is too long is cut, because the options are at its end.

    Raises:
        RecipeError: the data set is not named, or two settings contradict each other.
        DataError: a file or row cannot be used; the message names file and line.
        ModelError: the tokenizer lacks the chat template or the EOS token that is needed.
    """
    assert section.classification is not None  # rows of other formats have no options
    data_set = DataSet(section, tokenizer, which)
    lengths: list[int] = []
    samples: list[OptionsSample] = []
    for item in items_of(data_set, section.classification, tokenizer):
        sample = OptionsSample(item.prompt_ids, item.option_ids, item.label, item.source)
        lengths.append(len(sample))
        if len(sample) <= section.max_length:
            samples.append(sample)
        elif section.on_long != "drop":
            raise DataError(_too_long(item, len(sample), section.max_length))
    dropped = len(lengths) - len(samples)
    if not samples:
        raise DataError(
            f"{data_set.rows.name}: no row is left ({dropped} are longer than data.max_length={section.max_length}); "
            "raise data.max_length"
        )
    return LoadedSamples(
        samples=samples,
        format=data_set.format,
        layout=data_set.layout.name,
        dropped=dropped,
        truncated=0,
        lengths=np.array(lengths, dtype=np.int32),
        notes=(*data_set.notes, *_notes(samples, dropped)),
    )


def _too_long(item: ClassificationItem, length: int, max_length: int) -> str:
    return (
        f"{item.source}: {length} tokens of the prompt and its {len(item.option_ids)} options do not fit into "
        f"data.max_length={max_length}, and cut off there would be the options; raise it, or set data.on_long to drop"
    )


def _notes(samples: Sequence[OptionsSample], dropped: int) -> Iterator[str]:
    shapes = Counter(sample.is_tree for sample in samples)
    for is_tree, how in ((False, "at one position"), (True, "side by side in one row, where none sees another")):
        if shapes[is_tree]:
            number = max(len(sample.option_ids) for sample in samples)
            yield f"{shapes[is_tree]} rows: {number} options scored after one prompt, {how}"
    if dropped:
        yield f"{dropped} rows above max_length were dropped"
