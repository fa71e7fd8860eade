"""The training mixture and the scores of the RoSTE comparison: short abstracts to summarize, and Wikipedia articles.

Both become prompt and completion, with the loss on every token, so that one run is scored on both tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer

from qaft.data import generation_items, load_samples
from qaft.evaluate.generation import exact_match
from qaft.evaluate.perplexity import samples_perplexity, text_perplexity
from qaft.evaluate.unpacked import unpacked
from qaft.sections import DataSection

MAX_CHARACTERS = 1300
"""Longer abstracts are left out of all sets: time is short, and a third of a sequence would be cut."""

MAX_LENGTH = 512
ROUGES = ("rouge1", "rouge2", "rougeL")

_PARAGRAPH = range(300, 1500)
"""Characters of the paragraphs of articles that are trained on."""


def write_sets(summaries: Path, wiki: Path, folder: Path) -> dict[str, Path]:
    """Write ``train``, ``rouge`` and ``loss`` (the rows of validation that ROUGE does not see) as JSON lines.

    Args:
        summaries: folder with train.jsonl and valid.jsonl; source, and target as a list of references.
        wiki: the same with a field text.
        folder: where to; is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    valid = list(_summaries(summaries / "valid.jsonl"))
    half = len(valid) // 2
    train = [*_summaries(summaries / "train.jsonl"), *_paragraphs(wiki / "train.jsonl")]
    paths = {}
    for name, rows in (("train", train), ("rouge", valid[:half]), ("loss", valid[half:])):
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def section(**changes: Any) -> DataSection:
    """Return how these files are read."""
    return DataSection(format="prompt_completion", chat_template="plain", max_length=MAX_LENGTH, **changes)


def summary_scores(model: Any, tokenizer: Any, paths: dict[str, Path], *, documents: int) -> dict[str, float]:
    """Return ROUGE of greedy summaries against the best reference (percent), and the loss of the first reference."""
    path = paths["rouge"]
    items = generation_items(section(valid=str(path), limit=documents), tokenizer)
    answers = exact_match(model, tokenizer, items, max_new_tokens=40, batch_size=16).predictions
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:documents]]
    scorer = RougeScorer(ROUGES, use_stemmer=True)
    found = [scorer.score_multi(row["references"], _first_line(a)) for row, a in zip(rows, answers, strict=True)]
    scores = {name: 100 * sum(score[name].fmeasure for score in found) / len(found) for name in ROUGES}
    held_out = section(valid=str(paths["loss"]), limit=2 * documents)
    with unpacked(model):
        loss = samples_perplexity(model, load_samples(held_out, tokenizer, "valid").samples, max_length=MAX_LENGTH)
    return scores | {"summary_loss": loss.nll / loss.tokens}


def wiki_perplexity(model: Any, tokenizer: Any, wiki: Path, *, tokens: int) -> float:
    """Return the perplexity of the first tokens of the validation articles, in blocks of MAX_LENGTH."""
    text = "\n\n".join(row["text"] for row in _rows(wiki / "valid.jsonl"))
    ids = torch.tensor(tokenizer(text[: 8 * tokens]).input_ids)[:tokens]
    with unpacked(model):
        return text_perplexity(model, ids, max_length=MAX_LENGTH).value


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def _summaries(path: Path) -> Iterator[dict[str, Any]]:
    for row in _rows(path):
        if len(row["source"]) <= MAX_CHARACTERS:
            references = row["target"]
            yield {
                "prompt": f"{row['source']}\nTL;DR:",
                "completion": f" {references[0].strip()}",
                "references": references,
            }


def _paragraphs(path: Path) -> Iterator[dict[str, Any]]:
    for row in _rows(path):
        for paragraph in row["text"].splitlines():
            if len(paragraph) in _PARAGRAPH:
                prompt, _, rest = paragraph.partition(" ")
                yield {"prompt": prompt, "completion": f" {rest}"}


def _first_line(answer: str) -> str:
    return next((line for line in answer.splitlines() if line.strip()), "")
