"""lm-eval on a live model: results arrive by task and metric, and a missing extra is explained."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny_lm import tiny_llama

from qaft.errors import RecipeError
from qaft.evaluate.harness import harness_results


def install(monkeypatch: pytest.MonkeyPatch, evaluate: Any) -> None:
    for name, values in {
        "lm_eval": {"simple_evaluate": evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **options: SimpleNamespace(**options)},
        "lm_eval.tasks": {"TaskManager": lambda include_path=None: SimpleNamespace(all_tasks=["arc", "boolq"])},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)


def test_the_live_model_is_evaluated_and_numbers_are_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_llama().train(), []

    def evaluate(**options: Any) -> dict[str, Any]:
        calls.append((options["model"].pretrained is model, model.training, options["tasks"], options["limit"]))
        return {"results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": "N/A"}}}

    install(monkeypatch, evaluate)
    assert harness_results(model, "tokenizer", ["arc"], limit=3) == {"arc": {"acc,none": 0.5}}
    assert calls == [(True, False, ["arc"], 3)] and model.training


def test_an_unknown_task_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    with pytest.raises(RecipeError, match="tasks=arcc"):
        harness_results(tiny_llama(), None, ["arc", "arcc"])


def test_a_missing_extra_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r"pip install qaft\[eval\]"):
        harness_results(tiny_llama(), None, ["arc"])
