"""Tasks of the Language Model Evaluation Harness on a model in memory, fake quantization and all."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from qaft.errors import RecipeError
from qaft.layers.mode import evaluating


def harness_results(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """Return ``{task: {metric: value}}``.

    Args:
        model: a transformers causal LM, also with adapted layers.
        tokenizer: its tokenizer.
        tasks: names of lm-eval tasks.
        limit: rows per task; None for all.
        batch_size: rows per forward.

    Raises:
        RecipeError: the extra is not installed, or a task is not known.
    """
    try:
        lm_eval: Any = import_module("lm_eval")
        huggingface: Any = import_module("lm_eval.models.huggingface")
        manager = import_module("lm_eval.tasks").TaskManager()
    except ImportError as error:
        raise RecipeError(f"tasks need the extra eval ({error}): pip install qaft[eval]") from error
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise RecipeError(f"tasks={', '.join(unknown)}: not known to lm-eval; list them with: lm-eval ls tasks")
    with evaluating(model):
        lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(model=lm, tasks=list(tasks), limit=limit, task_manager=manager)
    return {task: _numbers(row) for task, row in found["results"].items()}


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    # Keys are "metric,filter" next to aliases and counts that are no numbers.
    return {key: float(value) for key, value in row.items() if isinstance(value, (int, float))}
