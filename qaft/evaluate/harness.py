"""Tasks of the Language Model Evaluation Harness on a model in memory, fake quantization and all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
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
        tasks: names of lm-eval tasks, or paths of ``.yaml`` files that define one each (with data of your own, say).
        limit: rows per task; None for all.
        batch_size: rows per forward.

    Raises:
        RecipeError: the extra is not installed, a task is not known, or a file defines none.
    """
    own = {_name_in(Path(task)): str(Path(task).parent) for task in tasks if Path(task).suffix == ".yaml"}
    names = [_name_in(Path(task)) if Path(task).suffix == ".yaml" else task for task in tasks]
    try:
        lm_eval: Any = import_module("lm_eval")
        huggingface: Any = import_module("lm_eval.models.huggingface")
        manager = import_module("lm_eval.tasks").TaskManager(include_path=sorted(set(own.values())) or None)
    except ImportError as error:
        raise RecipeError(f"tasks need the extra eval ({error}): pip install qaft[eval]") from error
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise RecipeError(f"tasks={', '.join(unknown)}: not known to lm-eval; list them with: lm-eval ls tasks")
    with evaluating(model):
        lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(model=lm, tasks=names, limit=limit, task_manager=manager)
    return {task: _numbers(row) for task, row in found["results"].items()}


def _name_in(path: Path) -> str:
    """Return the task that an lm-eval file defines."""
    try:
        # Its tags (!function) name Python code, which lm-eval loads; only the name is wanted here.
        found = re.search(r"^task:[ ]*(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError as error:
        raise RecipeError(f"tasks={path}: cannot be read ({error})") from error
    if found is None:
        raise RecipeError(f"tasks={path}: has no line `task: NAME`; write one as lm-eval's documentation shows")
    return found[1].strip("\"'")


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    # Keys are "metric,filter" next to aliases and counts that are no numbers.
    return {key: float(value) for key, value in row.items() if isinstance(value, (int, float))}
