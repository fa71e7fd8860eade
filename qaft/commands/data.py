"""``qaft data``: what the model will be trained on."""

from __future__ import annotations

from rich.console import Console

from qaft.data.report import data_report, print_report
from qaft.models.source import load_tokenizer, source_of
from qaft.recipe import Recipe


def show_data(recipe: Recipe, *, samples: int) -> None:
    """Print samples with trained tokens marked, lengths, truncation and duplicates of a recipe's data."""
    tokenizer = load_tokenizer(source_of(recipe.model))
    print_report(data_report(recipe.data, recipe.train, tokenizer, num_excerpts=samples), Console())
