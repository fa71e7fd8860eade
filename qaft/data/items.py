"""Rows as evaluation needs them: options to score, or a prompt to generate from. Token ids are those of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qaft.data.encode import TextEncoder
from qaft.data.examples import Completion
from qaft.data.files import Provenance
from qaft.data.formats import classification_label, parse_classification, rename_fields
from qaft.data.layouts import Layout, Piece, pieces, prompt_and_answer
from qaft.data.load import DataSet, Which
from qaft.errors import RecipeError
from qaft.sections import ClassificationSection, DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ClassificationItem:
    """One labelled row.

    Attributes:
        prompt_ids: what all options continue.
        option_ids: one entry per verbalizer, in their order, without end tokens.
        label: index of the right option.
        source: where the row stands.
    """

    prompt_ids: tuple[int, ...]
    option_ids: tuple[tuple[int, ...], ...]
    label: int
    source: Provenance


@dataclass(frozen=True, slots=True)
class GenerationItem:
    """One prompt and the answer that the data holds for it.

    Attributes:
        prompt_ids: the context up to the last answer, with the generation prompt of the chat template.
        reference: the text of that answer.
        source: where the row stands.
    """

    prompt_ids: tuple[int, ...]
    reference: str
    source: Provenance


def classification_items(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, which: Which = "valid"
) -> list[ClassificationItem]:
    """Return the rows of a classification set as prompts with their options.

    Raises:
        RecipeError: data.classification is not set.
        DataError: a row cannot be used; the message names file and line.
    """
    if section.classification is None:
        raise RecipeError("data.classification is not set; give prompt, label and verbalizers")
    return list(items_of(DataSet(section, tokenizer, which), section.classification, tokenizer))


def items_of(
    data_set: DataSet, settings: ClassificationSection, tokenizer: PreTrainedTokenizerBase
) -> Iterator[ClassificationItem]:
    """Yield the rows of an open classification set as prompts with their options.

    Raises:
        DataError: a row cannot be used; the message names file and line.
    """
    encoder = TextEncoder(tokenizer)
    classes = list(settings.verbalizers)
    for row in (rename_fields(row, data_set.section.columns) for row in data_set.rows):
        prompt = parse_classification(row, settings).prompt
        options = [Completion(prompt, text, row.source) for text in settings.verbalizers.values()]
        prompt_ids, option_ids = _options(options, data_set.layout, encoder)
        label = classes.index(classification_label(row, settings))
        yield ClassificationItem(prompt_ids, option_ids, label, row.source)


def generation_items(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, which: Which = "valid"
) -> list[GenerationItem]:
    """Return the rows as prompts to generate from, each with its reference answer.

    Raises:
        DataError: a row has no prompt or no answer, or cannot be used; the message names file and line.
    """
    data_set = DataSet(section, tokenizer, which)
    encoder = TextEncoder(tokenizer)
    items = []
    for chunk in data_set.chunks():
        written = [prompt_and_answer(example, data_set.layout) for example in chunk]
        prompts = [[Piece(prompt, False)] for prompt, _ in written]
        encoded = encoder.encode(prompts, add_begin=data_set.layout.adds_specials)
        for example, (_, answer), item in zip(chunk, written, encoded, strict=True):
            items.append(GenerationItem(tuple(item.ids.tolist()), answer, example.source))
    return items


def _options(
    options: Sequence[Completion], layout: Layout, encoder: TextEncoder
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    written = [pieces(option, layout)[0] for option in options]
    encoded = encoder.encode(written, add_begin=layout.adds_specials)
    # An option may be no token to this tokenizer, and then none is trained.
    num_prompt = max(int(item.trained.argmax()) for item in encoded)
    answers = [item.ids[num_prompt:] for item in encoded]
    # A template closes every option with the same tokens, which say nothing about the class.
    cut = [answer[: encoder.end_position(answer)].tolist() for answer in answers]
    return tuple(encoded[0].ids[:num_prompt].tolist()), tuple(tuple(answer) for answer in cut)
