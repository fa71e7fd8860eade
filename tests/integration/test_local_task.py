"""A task with data of one's own, through lm-eval itself: the live run and its export give the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_job import job, train

from qaft.cli import main
from qaft.commands.open import open_model
from qaft.errors import RecipeError
from qaft.evaluate.harness import harness_results

ROWS = [
    {"question": "The opposite of hot is", "choices": [" cold", " red", " seven"], "gold": 0},
    {"question": "Two and two are", "choices": [" nine", " four", " blue"], "gold": 1},
    {"question": "A cat says", "choices": [" moo", " seven", " meow"], "gold": 2},
]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "choices.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    definition = {
        "task": "own_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    path = tmp_path / "tasks" / "own.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(definition))
    return path


@pytest.mark.filterwarnings("ignore")
def test_a_live_run_and_its_export_give_equal_numbers(
    tiny_llama: Path, tmp_path: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    run = train(
        job(
            tiny_llama,
            tmp_path,
            qat={"weights": {"bits": 4, "group_size": 32}},
            model={"storage": "int4"},
            export=[{"format": "compressed-tensors"}],
        )
    )
    live = harness_results(run.loaded.model, run.loaded.tokenizer, [str(task)])
    opened = open_model(str(run.folder / "export-compressed-tensors"))
    exported = harness_results(opened.model, opened.tokenizer, [str(task)])
    assert set(live) == {"own_choices"} and 0 <= live["own_choices"]["acc,none"] <= 1
    assert live == exported
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["eval", str(run.folder / "export-compressed-tensors"), "--tasks", str(task)])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == live


@pytest.mark.parametrize(("content", "reason"), [(None, "cannot be read"), ("group: x\n", "no line `task: NAME`")])
def test_a_file_that_defines_no_task_is_named(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "own.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=rf"own\.yaml: .*{reason}"):
        harness_results(None, None, [str(path)])
