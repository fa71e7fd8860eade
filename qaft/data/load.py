"""From the data section of a recipe to samples, with everything worth telling the user about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import numpy as np

from qaft.data.examples import Example
from qaft.data.fields import listed
from qaft.data.files import Row
from qaft.data.formats import FIELDS, choose_format, parse_row
from qaft.data.layouts import PLAIN_TURNS, Layout, choose_layout
from qaft.data.render import Renderer
from qaft.data.samples import Ids, Sample
from qaft.data.sources import Rows, read_rows
from qaft.errors import DataError, RecipeError
from qaft.sections import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Which = Literal["train", "valid"]

CHUNK_ROWS = 512
"""Rows tokenized together: enough to make a call cheap, few enough that their text takes no memory to speak of."""


SampleT = TypeVar("SampleT")


@dataclass(frozen=True)
class LoadedSamples(Generic[SampleT]):
    """The samples of one data set, and what was found and changed on the way.

    Attributes:
        samples: in file order.
        format: ``messages``, ``text``, ...: given, or detected on the first row.
        layout: how the rows were written: chat template, plain turns, or as written.
        dropped: sequences above max_length that were left out (``on_long: drop``).
        truncated: samples cut at max_length; the end of their last answer is not trained.
        lengths: [sequences] int32, tokens before anything was cut or dropped.
        notes: sentences for the user about everything that was decided or changed.
    """

    samples: list[SampleT]
    format: str
    layout: str
    dropped: int
    truncated: int
    lengths: Ids
    notes: tuple[str, ...]


def load_samples(section: DataSection, tokenizer: PreTrainedTokenizerBase, which: Which) -> LoadedSamples[Sample]:
    """Return the training or validation data as samples.

    Raises:
        RecipeError: the data set is not named, or two settings contradict each other.
        DataError: a file or row cannot be used; the message names file and line.
        ModelError: the tokenizer lacks the chat template or the EOS token that is needed.
    """
    data_set = DataSet(section, tokenizer, which)
    renderer = Renderer(
        tokenizer,
        data_set.layout,
        max_length=section.max_length,
        train_on=section.train_on,
        on_long=section.on_long,
    )
    samples: list[Sample] = []
    for chunk in data_set.chunks():
        samples += renderer.render(chunk)
    if not samples:
        raise DataError(
            f"{data_set.rows.name}: no sample is left ({renderer.counts['dropped']} are longer than "
            f"data.max_length={section.max_length}, {renderer.counts['empty']} are empty); raise data.max_length"
        )
    return LoadedSamples(
        samples=samples,
        format=data_set.format,
        layout=data_set.layout.name,
        dropped=renderer.counts["dropped"],
        truncated=renderer.counts["truncated"],
        lengths=np.array(renderer.lengths, dtype=np.int32),
        notes=(*data_set.notes, *_changes(renderer, tokenizer)),
    )


class DataSet:
    """Rows with their format and layout settled on the first row.

    Attributes:
        rows: the source.
        format: given or detected.
        layout: how the examples are written for this tokenizer.
        notes: how these were chosen.

    Raises:
        RecipeError: the data set is not named, or two settings contradict each other.
        DataError: it cannot be read, or no format fits.
        ModelError: the tokenizer lacks the chat template or the EOS token that is needed.
    """

    def __init__(self, section: DataSection, tokenizer: PreTrainedTokenizerBase, which: Which) -> None:
        self.section = section
        self.rows = _rows(section, which)
        first = next(iter(self.rows))
        self.format = choose_format(section, first)
        self.layout = choose_layout(section.chat_template, self.format, tokenizer)
        if section.on_long == "split" and self.format != "text":
            raise RecipeError(
                f"data.on_long=split is for the format text, and {self.rows.name} has the format {self.format}: "
                "an answer without its prompt teaches nothing; use truncate, drop or error"
            )
        self.notes = tuple(_choices(section, self.format, self.layout, first))

    def examples(self) -> Iterator[Example]:
        """Yield every row as an example.

        Raises:
            DataError: a row does not have the format; the message names file, line and field.
        """
        return (parse_row(row, self.format, self.section) for row in self.rows)

    def chunks(self) -> Iterator[Sequence[Example]]:
        """Yield the examples, at most CHUNK_ROWS at a time."""
        examples = self.examples()
        return iter(lambda: list(islice(examples, CHUNK_ROWS)), [])


def _rows(section: DataSection, which: Which) -> Rows:
    spec = section.train if which == "train" else section.valid
    if spec is None:
        raise RecipeError(f"data.{which} is not set; give a file or a hub id")
    return read_rows(spec, split=section.train_split if which == "train" else section.valid_split, limit=section.limit)


def _choices(section: DataSection, name: str, layout: Layout, first: Row) -> Iterator[str]:
    how = "detected" if section.format == "auto" and section.classification is None else "as set"
    yield f"format {name} ({how}); fields: {listed(first.fields)}"
    wanted = {section.columns.get(field, field) for field in FIELDS.get(name, ())}
    unused = [field for field in first.fields if field not in wanted | {"input", "system", *section.columns.values()}]
    if unused and name != "classification":
        yield f"fields not used: {', '.join(unused)}"
    missing = layout.name == PLAIN_TURNS and section.chat_template == "auto"
    yield f"layout: {layout.name}{', because the tokenizer has no chat template' if missing else ''}"


def _changes(renderer: Renderer, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    counts = renderer.counts
    messages = {
        "truncated": "samples were cut at max_length; the end of their last answer is not trained",
        "dropped": "samples above max_length were dropped",
        "split": "texts above max_length were split into windows",
        "empty": "empty texts were skipped",
        "rewritten": "conversations became one sample per answer: the chat template writes earlier turns differently",
        "separate": "prompts end inside a token (often a trailing space): prompt and answer were tokenized separately",
    }
    for key, message in messages.items():
        if counts[key]:
            yield f"{counts[key]} {message}"
    other = [token for token in renderer.ends if token != tokenizer.eos_token_id]
    if other:
        names = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(other))
        yield f"answers end with {names}, not with EOS {tokenizer.eos_token!r}: generation has to stop at it too"
