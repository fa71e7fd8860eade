"""``qaft eval``: perplexity, verbalizer accuracy, exact match and lm-eval tasks, of a run or of any checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from qaft.build import is_run_folder
from qaft.commands.memory import evaluation_memory
from qaft.commands.open import OpenedModel, open_model
from qaft.data import classification_items, generation_items, load_samples
from qaft.errors import RecipeError
from qaft.evaluate.classification import verbalizer_accuracy
from qaft.evaluate.generation import exact_match
from qaft.evaluate.perplexity import samples_perplexity
from qaft.recipe import apply_overrides, load_recipe, parse_recipe
from qaft.registry import suggest
from qaft.sections import DataSection


def _perplexity(opened: OpenedModel, section: DataSection, _: int) -> dict[str, float]:
    samples = load_samples(section, opened.tokenizer, "valid").samples
    result = samples_perplexity(opened.model, samples, max_length=section.max_length)
    return {"eval_loss": result.nll / result.tokens, "perplexity": result.value, "tokens": result.tokens}


def _accuracy(opened: OpenedModel, section: DataSection, _: int) -> dict[str, float]:
    result = verbalizer_accuracy(opened.model, classification_items(section, opened.tokenizer))
    return {"accuracy": result.value, "choice_loss": result.choice_loss, "rows": result.total}


def _exact_match(opened: OpenedModel, section: DataSection, max_new_tokens: int) -> dict[str, float]:
    items = generation_items(section, opened.tokenizer)
    result = exact_match(opened.model, opened.tokenizer, items, max_new_tokens=max_new_tokens)
    return {"exact_match": result.value, "rows": result.total}


METRICS: dict[str, Callable[[OpenedModel, DataSection, int], dict[str, float]]] = {
    "accuracy": _accuracy,
    "exact_match": _exact_match,
    "perplexity": _perplexity,
}


def data_section(model: str, overrides: Sequence[str], *, data: str | None, limit: int | None) -> DataSection:
    """Return the evaluation data: the run's own, changed by overrides and options.

    Raises:
        RecipeError: there is no evaluation data, or an override is wrong.
    """
    raw: dict[str, Any] = load_recipe(model).dump() if is_run_folder(model) else {"model": {"name": model}}
    section = parse_recipe(apply_overrides(raw, overrides), source="qaft eval").data
    changes: dict[str, Any] = {} if data is None else {"valid": data}
    changes |= {} if limit is None else {"limit": limit}
    section = section.model_copy(update=changes)
    if section.valid is None:
        raise RecipeError("there is no evaluation data: give --data FILE, or a run whose recipe has data.valid")
    return section


def evaluate_model(
    model: str,
    overrides: Sequence[str],
    *,
    data: str | None,
    metrics: Sequence[str],
    tasks: Sequence[str],
    limit: int | None,
    max_new_tokens: int,
) -> None:
    """Print one JSON object with everything that was asked for.

    Raises:
        RecipeError: an unknown metric, or no data.
    """
    for name in metrics:
        if name not in METRICS:
            raise RecipeError(f"metric {name!r}: must be one of {', '.join(METRICS)}{suggest(name, dict(METRICS))}")
    # Tasks bring their own data: without --data they are measured alone.
    section = None if tasks and data is None else data_section(model, overrides, data=data, limit=limit)
    opened = open_model(model)
    results: dict[str, Any] = {"model": model}
    if section is not None:
        for name in metrics:
            with evaluation_memory(name, {"data.max_length": section.max_length}):
                results |= METRICS[name](opened, section, max_new_tokens)
    if tasks:
        from qaft.evaluate.harness import harness_results

        with evaluation_memory("tasks", {}):
            results["tasks"] = harness_results(opened.model, opened.tokenizer, tasks, limit=limit)
    Console().print_json(json.dumps(results))
