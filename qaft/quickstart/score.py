"""Loss and exact match of one model on the quickstart's held-out rows; as a program, of a folder in a fresh process.

python -m qaft.quickstart.score FOLDER DATA [--rows N]        prints one JSON object
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

from qaft.data import generation_items, load_samples
from qaft.evaluate.generation import exact_match
from qaft.evaluate.perplexity import samples_perplexity
from qaft.models.plain import load_plain
from qaft.sections import DataSection

MAX_LENGTH = 256
MAX_NEW_TOKENS = 40
"""The longest call of the task has 34 tokens."""

BATCH = 50


@dataclass(frozen=True)
class Score:
    """``loss``: nats per answer token; ``correct`` of ``total`` answers equal to the letter."""

    loss: float
    correct: int
    total: int
    first_answer: str

    @property
    def exact_match(self) -> float:
        """Return the share of answers that are equal to the letter."""
        return self.correct / self.total


def score(model: Any, tokenizer: Any, data: str, *, rows: int | None = None) -> Score:
    """Return loss and greedy exact match of ``model`` on the rows of ``data``."""
    section = DataSection(valid=data, max_length=MAX_LENGTH, limit=rows)
    loss = samples_perplexity(model, load_samples(section, tokenizer, "valid").samples, max_length=MAX_LENGTH)
    match = exact_match(
        model, tokenizer, generation_items(section, tokenizer), max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH
    )
    return Score(loss.nll / loss.tokens, match.correct, match.total, match.predictions[0])


def main() -> None:
    """Score a folder with plain transformers and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("data")
    parser.add_argument("--rows", type=int)
    arguments = parser.parse_args()
    model, tokenizer = load_plain(arguments.folder)
    print("SCORE " + json.dumps(asdict(score(model, tokenizer, arguments.data, rows=arguments.rows))))


if __name__ == "__main__":
    main()
