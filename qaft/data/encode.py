"""From pieces of text to token ids with a mask, so that every prompt has exactly the ids that generation starts from.

The pieces of a sequence are tokenized as one text when every border between them is a border between tokens, that is
when the ids of each prefix are a prefix of the ids of the whole. Where they are not ("It was " + "great": the tokens
would be "It", " was", " great"), the pieces are tokenized one by one and joined, which is what generation does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from qaft.data.layouts import Piece
from qaft.data.samples import Ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHOR = "\n"
"""Put before a piece that continues a text, so that tokenizers which mark word starts do not invent a space."""


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the EOS token, or None when the tokenizer has none."""
    return cast("int | None", tokenizer.eos_token_id)


class Encoded(NamedTuple):
    """A tokenized sequence of pieces.

    Attributes:
        ids: [n] int32.
        trained: [n] bool.
        separate: the pieces had to be tokenized one by one.
    """

    ids: Ids
    trained: npt.NDArray[np.bool_]
    separate: bool


class TextEncoder:
    """Tokenizes pieces, and knows the tokens that begin and end a sequence.

    Attributes:
        begin_ids: what the tokenizer itself puts before a text (BOS), possibly nothing.
        end_ids: tokens that can end an answer: EOS and every other special token except BOS and unknown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.begin_ids = _begin_ids(tokenizer)
        self.end_ids = _end_ids(tokenizer)
        self._is_space: dict[int, bool] = {}

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without the special tokens that the tokenizer would add."""
        if not texts:
            return []
        batch = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return batch["input_ids"]  # pyright: ignore[reportReturnType]

    def encode(self, sequences: Sequence[Sequence[Piece]], *, add_begin: bool) -> list[Encoded]:
        """Return the sequences as ids and masks.

        Args:
            sequences: pieces that are not empty; a text may not be empty as a whole.
            add_begin: put begin_ids before the text, unless the text brings them itself.
        """
        prefixes = [list(accumulate(piece.text for piece in sequence)) for sequence in sequences]
        ids = iter(self.tokens(list(chain.from_iterable(prefixes))))
        begin = self.begin_ids if add_begin else []
        encoded = []
        for sequence, texts in zip(sequences, prefixes, strict=True):
            parts = _split([np.array(next(ids), dtype=np.int32) for _ in texts])
            joint = parts is not None
            if parts is None:
                parts = [self._alone(piece.text, continues=i > 0) for i, piece in enumerate(sequence)]
            encoded.append(_join(parts, [piece.trained for piece in sequence], begin, separate=not joint))
        return encoded

    def end_position(self, ids: Sequence[int] | Ids) -> int | None:
        """Return the index of the end token that closes ``ids`` (white space after it is allowed), or None."""
        for position in range(len(ids) - 1, -1, -1):
            token = int(ids[position])
            if token in self.end_ids:
                return position
            if not self._space(token):
                return None
        return None

    def _space(self, token: int) -> bool:
        if token not in self._is_space:
            self._is_space[token] = not str(self.tokenizer.decode([token])).strip()
        return self._is_space[token]

    def _alone(self, text: str, *, continues: bool) -> Ids:
        anchor, anchored, alone = self.tokens([ANCHOR, ANCHOR + text, text])
        clean = continues and anchored[: len(anchor)] == anchor
        return np.array(anchored[len(anchor) :] if clean else alone, dtype=np.int32)


def _begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    probe = "a"
    bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
    full = list(tokenizer(probe)["input_ids"])  # pyright: ignore[reportArgumentType]
    starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return full[: next(starts, 0)]


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    # A template may close a turn with a token that is special in the vocabulary but has no name such as EOS.
    ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    eos, others = eos_id(tokenizer), (tokenizer.bos_token_id, tokenizer.unk_token_id)
    ids = (ids | set(tokenizer.all_special_ids)).difference(cast("tuple[int, ...]", others))
    return frozenset(ids if eos is None else ids | {eos})


def _split(ids: Sequence[Ids]) -> list[Ids] | None:
    """Return the ids that each prefix adds to the one before it, or None when one is not a prefix of the last."""
    if any(len(part) > len(ids[-1]) or not np.array_equal(part, ids[-1][: len(part)]) for part in ids):
        return None
    ends = [len(part) for part in ids]
    if ends != sorted(ends):
        return None
    return [ids[-1][begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _join(parts: Sequence[Ids], trained: Sequence[bool], begin: Sequence[int], *, separate: bool) -> Encoded:
    ids = np.concatenate(parts)
    mask = np.repeat(np.array(trained, dtype=np.bool_), [len(part) for part in parts])
    if begin and ids[: len(begin)].tolist() != list(begin):
        ids = np.concatenate([np.array(begin, dtype=np.int32), ids])
        mask = np.concatenate([np.zeros(len(begin), dtype=np.bool_), mask])
    return Encoded(ids, mask, separate)
