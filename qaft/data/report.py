"""What ``qaft data`` tells about a data set before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from qaft.data.batches import TrainBatches
from qaft.data.load import LoadedSamples, Which, load_samples
from qaft.data.options import OptionsSample, load_options
from qaft.data.samples import IGNORE_INDEX, Sample
from qaft.sections import DataSection, TrainSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_BINS = 10
BAR_WIDTH = 40
TRAINED_STYLE = "bold green"

SHOWN_CHARACTERS = 600
"""Of each stretch of an excerpt; its middle is left out."""


@dataclass(frozen=True)
class Excerpt:
    """One sample for the eye: where it stands, and its text in stretches, some of which are marked.

    Attributes:
        source: file and line.
        stretches: text, and whether it is marked.
        marked: what the marked ones are.
    """

    source: str
    stretches: tuple[tuple[str, bool], ...]
    marked: str = "trained text"


@dataclass(frozen=True)
class DataReport:
    """Numbers about the training data, and about its overlap with the validation data.

    Attributes:
        format: detected or given.
        layout: how rows were written.
        notes: decisions and changes, of training and validation data.
        num_samples: training samples.
        num_valid: validation samples; None without validation data.
        num_tokens: tokens of all training samples.
        trained_share: fraction 0-1 of these tokens that carry loss; None where samples are choices between options.
        truncated: samples cut at max_length.
        dropped: samples left out for their length.
        histogram: (from, below, sequences) by tokens before any cut; the last bin is open to the right and holds what
            is longer than max_length.
        duplicates: training samples that equal an earlier one.
        overlap: validation samples that equal a training sample.
        rows_per_epoch: rows after packing, in the first epoch.
        packing_efficiency: fraction 0-1 of the places in these rows that hold a token.
        steps_per_epoch: optimizer steps, may be fractional.
        epochs: train.steps over steps_per_epoch.
        excerpts: the first samples.
    """

    format: str
    layout: str
    notes: tuple[str, ...]
    num_samples: int
    num_valid: int | None
    num_tokens: int
    trained_share: float | None
    truncated: int
    dropped: int
    histogram: tuple[tuple[int, int | None, int], ...]
    duplicates: int
    overlap: int
    rows_per_epoch: int
    packing_efficiency: float
    steps_per_epoch: float
    epochs: float
    excerpts: tuple[Excerpt, ...]


def data_report(
    section: DataSection, train: TrainSection, tokenizer: PreTrainedTokenizerBase, *, num_excerpts: int = 3
) -> DataReport:
    """Return the report for the data of a recipe.

    Raises:
        RecipeError: data.train is not set, or settings contradict each other.
        DataError: the data cannot be used; the message names file and line.
        ModelError: the tokenizer lacks what the recipe asks for.
    """
    loaded = _load(section, tokenizer, "train")
    valid = _load(section, tokenizer, "valid") if section.valid is not None else None
    samples = loaded.samples
    keys = Counter(_key(sample) for sample in samples)
    num_tokens = sum(len(sample) for sample in samples)
    rows = TrainBatches(
        samples,
        max_length=section.max_length,
        batch_size=train.batch_size,
        grad_accumulation=train.grad_accumulation,
        steps=train.steps,
        packing=section.packing,
        seed=train.seed,
    ).epoch_rows(0)
    steps_per_epoch = len(rows) / (train.batch_size * train.grad_accumulation)
    return DataReport(
        format=loaded.format,
        layout=loaded.layout,
        notes=_notes(loaded, valid),
        num_samples=len(samples),
        num_valid=None if valid is None else len(valid.samples),
        num_tokens=num_tokens,
        trained_share=None if section.scores_options else sum(sample.num_targets for sample in samples) / num_tokens,
        truncated=loaded.truncated,
        dropped=loaded.dropped,
        histogram=_histogram(loaded.lengths, section.max_length),
        duplicates=len(samples) - len(keys),
        overlap=0 if valid is None else sum(_key(sample) in keys for sample in valid.samples),
        rows_per_epoch=len(rows),
        packing_efficiency=num_tokens / (len(rows) * section.max_length),
        steps_per_epoch=steps_per_epoch,
        epochs=train.steps / steps_per_epoch,
        excerpts=tuple(_excerpt(sample, tokenizer) for sample in samples[:num_excerpts]),
    )


def print_report(report: DataReport, console: Console) -> None:
    """Print the report; marked text is coloured, or set in ``[[...]]`` where the console has no colour."""
    valid = "" if report.num_valid is None else f", {report.num_valid:,} for validation"
    share = report.trained_share
    trained = "one choice between options in each sample" if share is None else f"{share:.1%} trained"
    facts = {
        "format": report.format,
        "layout": report.layout,
        "samples": f"{report.num_samples:,}{valid}",
        "tokens": f"{report.num_tokens:,}, {trained}",
        "too long": f"{report.truncated:,} truncated, {report.dropped:,} dropped",
        "duplicates": f"{report.duplicates:,} within train, {report.overlap:,} of validation also in train",
        "rows": f"{report.rows_per_epoch:,} per epoch, {report.packing_efficiency:.1%} filled",
        "steps": f"{report.steps_per_epoch:,.1f} per epoch, {report.epochs:,.2f} epochs in all",
    }
    for name, value in facts.items():
        console.print(Text(f"{name:<12}{value}"))
    for note in report.notes:
        console.print(Text(f"note        {note}"))
    console.print(Text("\ntokens per sample, before any cut"))
    for line in _bars(report.histogram, "█" if "utf" in console.encoding else "#"):
        console.print(Text(line))
    coloured = console.is_terminal and not console.no_color
    mark = "in colour" if coloured else "in [[ ]]"
    for excerpt in report.excerpts:
        console.print(Text(f"\n{excerpt.source} ({excerpt.marked} {mark})", style="dim"))
        console.print(_marked(excerpt, coloured))


def _load(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, which: Which
) -> LoadedSamples[Sample] | LoadedSamples[OptionsSample]:
    return (load_options if section.scores_options else load_samples)(section, tokenizer, which)


def _notes(train: LoadedSamples[Any], valid: LoadedSamples[Any] | None) -> tuple[str, ...]:
    own = tuple(f"train: {note}" for note in train.notes)
    return own if valid is None else own + tuple(f"valid: {note}" for note in valid.notes)


def _key(sample: Sample | OptionsSample) -> bytes:
    if isinstance(sample, OptionsSample):
        content = repr((sample.prompt_ids, sample.option_ids, sample.label)).encode()
    else:
        content = sample.input_ids.tobytes() + sample.labels.tobytes()
    # A digest, so that the keys of a million samples fit into memory.
    return blake2b(content, digest_size=16).digest()


def _histogram(lengths: np.ndarray, max_length: int) -> tuple[tuple[int, int | None, int], ...]:
    width = -(-max_length // NUM_BINS)
    edges = [*range(0, max_length, width), max_length + 1]
    inside = [(a, b, int(((lengths >= a) & (lengths < b)).sum())) for a, b in pairwise(edges)]
    return (*inside, (max_length + 1, None, int((lengths > max_length).sum())))


def _bars(histogram: Sequence[tuple[int, int | None, int]], block: str) -> list[str]:
    most = max(n for _, _, n in histogram)
    lines = []
    for begin, end, number in histogram:
        name = f"{begin:,}-{end - 1:,}" if end is not None else f"{begin:,} and more"
        # Rounded up: a bin that is not empty shows at least one block.
        lines.append(f"{name:>16} {block * -(-number * BAR_WIDTH // most)} {number:,}")
    return lines


def _excerpt(sample: Sample | OptionsSample, tokenizer: PreTrainedTokenizerBase) -> Excerpt:
    return _choice(sample, tokenizer) if isinstance(sample, OptionsSample) else _trained(sample, tokenizer)


def _choice(sample: OptionsSample, tokenizer: PreTrainedTokenizerBase) -> Excerpt:
    """Return the prompt and, below it, every option as it is scored; the right one is marked."""
    prompt = str(tokenizer.decode(list(sample.prompt_ids)))
    stretches = [(prompt, False)]
    for number, option in enumerate(sample.option_ids):
        text = str(tokenizer.decode([*sample.prompt_ids, *option]))[len(prompt) :]
        stretches += [(f"\n{number + 1:>4} ", False), (text, number == sample.label)]
    return Excerpt(str(sample.source), tuple(stretches), "right option")


def _trained(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Excerpt:
    trained = sample.labels != IGNORE_INDEX
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(sample)]
    # Decoded from the start each time: alone, many tokenizers drop the space at the beginning of a stretch.
    texts = pairwise(str(tokenizer.decode(sample.input_ids[:border].tolist())) for border in borders)
    stretches = tuple(
        (after[len(before) :], bool(trained[border])) for border, (before, after) in zip(borders, texts, strict=False)
    )
    return Excerpt(str(sample.source), stretches)


def _marked(excerpt: Excerpt, coloured: bool) -> Text:
    text = Text()
    for stretch, trained in excerpt.stretches:
        cut = stretch
        if len(stretch) > SHOWN_CHARACTERS:
            half = SHOWN_CHARACTERS // 2
            cut = f"{stretch[:half]} ... {len(stretch) - 2 * half:,} characters ... {stretch[-half:]}"
        shown = cut if coloured or not trained else f"[[{cut}]]"
        text.append(shown, style=TRAINED_STYLE if coloured and trained else None)
    return text
