"""The command line: every mistake is one line with the right exit code, and every verb does what it says."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write_checkpoint
from tiny_job import job, write_job

from qaft.cli import LISTS, main
from qaft.export import EXPORTERS
from qaft.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str | Path) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Result(int(end.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    raw = job(
        tiny_llama,
        folder,
        qat={"weights": {"bits": 4, "group_size": 32}},
        train={"steps": 2},
        export=[{"format": "compressed-tensors", "verify": False}],
    )
    return write_job(folder / "recipe.yaml", raw)


@pytest.fixture(scope="session")
def run_folder(recipe: Path) -> Path:
    """A run with its export; read by many tests and changed by none."""
    with pytest.raises(SystemExit) as end:
        main(["train", str(recipe)])
    assert not end.value.code
    return recipe.parent / "run"


def refused(result: Result, code: int, *fragments: str) -> None:
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert len(lines) == 1, result.err
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    for fragment in fragments:
        assert fragment in lines[0]


MISTAKES: dict[str, tuple[list[str], int, list[str]]] = {
    "unknown key": (["train.stpes=3"], 2, ["train.stpes is not a key", "did you mean 'steps'?"]),
    "unknown section": (["trian.steps=3"], 2, ["trian is not a key", "did you mean 'train'?"]),
    "wrong type": (["train.steps=many"], 2, ["train.steps='many'", "integer"]),
    "impossible value": (["qat.weights.bits=9"], 2, ["qat.weights.bits=9", "8"]),
    "no override": (["steps"], 2, ["'steps' must look like section.key=value"]),
    "unknown update": (["update.kind=dens"], 2, ["update.kind='dens'", "did you mean 'dense'?"]),
    "unknown option": (["update.kind=lowrank", "update.rnk=3"], 2, ["update.rnk", "did you mean 'rank'?"]),
    "impossible option": (["update.kind=lowrank", "update.rank=0"], 2, ["rank=0", "must be in [1, 128]"]),
    "unknown rotation": (["qat.rotation=hadamrd"], 2, ["hadamrd", "hadamard"]),
    "unmatched pattern": (["select.targets=[q_prj]"], 2, ["'q_prj' matches no linear layer", "q_proj"]),
    "unknown format": (["export=[{format: mergd}]"], 2, ["mergd", "did you mean 'merged'?"]),
    "option of another format": (["export.0.dtype=float16"], 2, ["float16", "leave it out for"]),
    "impossible pair": (["model.storage=nf4"], 2, ["bitsandbytes storage x compressed-tensors export"]),
    "no training data": (["data.train=null"], 2, ["data.train is required"]),
    "missing data": (["data.train=nowhere/rows.jsonl"], 4, ["nowhere/rows.jsonl: no such file"]),
    "empty mask": (["data.max_length=8"], 4, ["max_length"]),
    "no such model": (["model.name=./nowhere"], 1, ["nowhere"]),
    "group size": (["qat.weights.group_size=24"], 1, ["width 128", "group_size=24", "32, 64, 128"]),
    "no number": (["optim.lr=1e38", "optim.clip=null", "train.steps=4"], 1, ["step 2", "optim.lr"]),
    "optimizer without GPU": (["optim.name=paged_adamw_8bit"], 2, ["optim.name"]),
    "unknown tracker": (["train.report_to=[tensorbord]"], 2, ["tensorbord"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_recipe_is_one_line_with_its_exit_code(
    mistake: str, cli: Cli, recipe: Path, tmp_path: Path
) -> None:
    overrides, code, fragments = MISTAKES[mistake]
    refused(cli("train", recipe, f"train.output={tmp_path / 'run'}", *overrides), code, *fragments)


USAGE: dict[str, tuple[list[str], int, list[str]]] = {
    "missing recipe": (["train", "nowhere.yaml"], 2, ["nowhere.yaml: no such recipe"]),
    "folder without run": (["train", "."], 2, ["not a run folder"]),
    "unknown list": (["list", "update"], 2, ["'update'", "did you mean 'updates'?"]),
    "eval without data": (["eval", "."], 2, ["no evaluation data", "--data"]),
    "unknown metric": (["eval", ".", "--metrics", "perplexty"], 2, ["did you mean 'perplexity'?"]),
    "export of no run": (["export", ".", "-f", "merged"], 2, ["not a run folder"]),
    "no such model": (["diff", "nowhere/a", "nowhere/b"], 1, ["nowhere/a"]),
}


@pytest.mark.parametrize("mistake", USAGE)
def test_a_mistake_in_an_argument_is_one_line_with_its_exit_code(
    mistake: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, code, fragments = USAGE[mistake]
    monkeypatch.chdir(tmp_path)
    refused(cli(*arguments), code, *fragments)


@pytest.mark.parametrize(
    "arguments",
    [["trian"], ["train"], ["export", "run"], ["diff", "a"], ["diff", "a", "b", "--gate", "small"], ["list"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_says_how(arguments: list[str], cli: Cli) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert "Usage: " in result.err
    assert "Error" in result.err
    assert "Traceback" not in result.err


def test_broken_yaml_is_one_line(cli: Cli, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: {name: [}\n")
    refused(cli("train", broken), 2, str(broken), "not valid YAML", "line 1")


def test_a_broken_data_line_is_named(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    data = tmp_path / "broken.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    for verb in ("train", "data"):
        result = cli(verb, recipe, f"data.train={data}", f"train.output={tmp_path / 'run'}")
        refused(result, 4, f"{data}, line 2", "not JSON")


def test_a_missing_chat_template_is_named_when_it_is_asked_for(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", template=None)
    overrides = [f"model.name={model}", "data.chat_template=tokenizer", f"train.output={tmp_path / 'run'}"]
    refused(cli("train", recipe, *overrides), 1, "no chat template", "plain")


def test_a_base_model_that_computes_no_numbers_is_refused_before_training(
    cli: Cli, tiny_llama: Path, recipe: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.inf)
    save_file(tensors, file, metadata={"format": "pt"})
    overrides = [f"model.name={tmp_path / 'model'}", "qat.rotation=none", f"train.output={tmp_path / 'run'}"]
    refused(cli("train", recipe, *overrides), 1, "logits of the base model are not finite", "model.dtype")


def test_an_unknown_family_is_refused_for_rotations_only(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", family="stablelm", dtype=torch.float32)
    overrides = [f"model.name={model}", "select.targets=[q_proj]", f"train.output={tmp_path / 'run'}"]
    refused(cli("train", recipe, *overrides), 1, "'stablelm'", "gpt_neox, llama, mistral, opt")
    assert not (tmp_path / "run").exists()
    adapter = ["qat=null", "update.kind=lowrank", "export=[{format: merged, verify: false}]"]
    result = cli("train", recipe, *overrides, *adapter)
    assert result.code == 0, result.err
    assert (tmp_path / "run" / "export-merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("verb", ["train", "export"])
def test_an_export_never_overwrites_a_folder_unasked(
    verb: str, cli: Cli, recipe: Path, run_folder: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    if verb == "train":
        result = cli("train", recipe, f"export.0.out={taken}", f"train.output={tmp_path / 'run'}")
        # It is said before the training, not after.
        assert not (tmp_path / "run").exists()
    else:
        result = cli("export", run_folder, "-f", "merged", "--out", taken)
    refused(result, 1, f"{taken}: exists already")
    assert [p.name for p in taken.iterdir()] == ["file"]


def test_unknown_export_formats_are_refused_with_the_known_ones(cli: Cli, run_folder: Path) -> None:
    refused(cli("export", run_folder, "-f", "exl2"), 2, "'exl2'", *EXPORTERS)


def test_a_run_that_was_never_saved_is_named(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    shutil.copy(run_folder / "qaft.yaml", tmp_path)
    for arguments in (["eval", tmp_path], ["export", tmp_path, "-f", "merged"], ["chat", tmp_path]):
        refused(cli(*arguments), 1, f"{tmp_path}: no good checkpoint")


def test_a_finished_run_is_not_overwritten_unasked(cli: Cli, recipe: Path, run_folder: Path) -> None:
    refused(cli("train", recipe, "export=[]"), 2, "train.resume=true", str(run_folder))


def test_debug_shows_where_an_error_came_from() -> None:
    command = [sys.executable, "-m", "qaft", "train", "nowhere.yaml", "--debug"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode != 0
    assert "Traceback" in result.stderr
    assert "no such recipe" in result.stderr


def test_the_module_and_the_script_are_the_same_program() -> None:
    script = Path(sys.executable).with_name("qaft")
    starts = [[sys.executable, "-m", "qaft"], [str(script)] if script.exists() else [sys.executable, "-c", _SCRIPT]]
    results = [subprocess.run([*s, "schema"], capture_output=True, text=True, cwd=ROOT, check=False) for s in starts]
    assert [r.returncode for r in results] == [0, 0]
    assert results[0].stdout == results[1].stdout


_SCRIPT = "from qaft.cli import main; main()"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["train", "nowhere.yaml"], ["schema"], ["train", "configs/quickstart.yaml", "a.b=1"]],
    ids=" ".join,
)  # fmt: skip
def test_answers_that_need_no_model_come_without_torch(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom qaft.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


def test_launchers_may_inject_their_rank(recipe: Path, tmp_path: Path) -> None:
    output = f"train.output={tmp_path / 'run'}"
    command = [sys.executable, "launch/train.py", "--local_rank=0", str(recipe), output, "--train.steps", "1", "export=[]"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "checkpoint-1" / "manifest.json").is_file()


@pytest.mark.parametrize("what", LISTS)
def test_lists_show_every_registered_name(what: str, cli: Cli) -> None:
    from qaft.commands.listing import _registries
    from qaft.compat import INCOMPATIBLE

    result = cli("list", what)
    assert result.code == 0
    names = [row.name for row in INCOMPATIBLE] if what == "compat" else list(_registries()[what]())
    assert names or what == "regularizers"
    shown = " ".join(result.out.split())
    assert all(name.split()[0] in shown for name in names)


def test_the_schema_describes_every_section(cli: Cli) -> None:
    schema = json.loads(cli("schema").out)
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert {"ModelSection", "QatSection", "DataSection", "TrainSection", "ExportSection"} <= set(schema["$defs"])
    assert all(f"#/$defs/{name}" in json.dumps(schema) for name in schema["$defs"])


def test_data_marks_the_tokens_that_are_trained(cli: Cli, recipe: Path) -> None:
    result = cli("data", recipe, "--samples", "2")
    assert result.code == 0, result.err
    assert "Box 0 is[[ red" in result.out
    assert "Box 1 is[[ green" in result.out
    assert "Box 2" not in result.out


def measured(result: Result) -> dict[str, Any]:
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_a_run_and_its_export_measure_alike(cli: Cli, recipe: Path, run_folder: Path) -> None:
    data = ["--data", recipe.parent / "rows.jsonl", "data.chat_template=plain", "data.max_length=64"]
    metrics = ["--metrics", "perplexity,exact_match", "--max-new-tokens", "4"]
    trained = measured(cli("eval", run_folder, *metrics))
    exported = measured(cli("eval", run_folder / "export-compressed-tensors", *data, *metrics))
    assert trained["perplexity"] == pytest.approx(exported["perplexity"], rel=1e-5)
    assert trained["tokens"] == exported["tokens"] > 0
    assert trained["exact_match"] == exported["exact_match"]
    assert trained["rows"] == 8


def test_the_losses_of_the_two_answers_to_one_question_are_the_odds_of_one_choice(
    cli: Cli, tiny_llama: Path, tmp_path: Path
) -> None:
    classes = 'data.classification={"prompt": "{text}", "verbalizers": {"0": " red", "1": " dark green"}}'
    found = []
    for label in (0, 1):
        data = tmp_path / f"{label}.jsonl"
        data.write_text(json.dumps({"text": "Box 7 is", "label": label}))
        options = ["--data", data, "--metrics", "accuracy", "data.format=classification", classes]
        found.append(measured(cli("eval", tiny_llama, *options)))
    assert sum(math.exp(-one["choice_loss"]) for one in found) == pytest.approx(1)
    assert [one["accuracy"] for one in found] == [float(one["choice_loss"] < math.log(2)) for one in found]
    assert [one["rows"] for one in found] == [1, 1]


def test_diff_finds_the_export_equal_and_the_base_different(cli: Cli, run_folder: Path, tiny_llama: Path) -> None:
    export = run_folder / "export-compressed-tensors"
    equal = cli("diff", run_folder, export, "--gate", "1e-5")
    assert equal.code == 0, equal.err
    assert "KL, nats per token" in equal.out
    assert "bound of compressed-tensors" in equal.out and "allowed 1.00e-05: holds" in equal.out
    refused(cli("diff", run_folder, tiny_llama, "--gate", "1e-5"), 5, "the gate is 1e-05")


def test_chat_answers_every_line_of_its_input(cli: Cli, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Box 0 is\nBox 1 is\n"))
    result = cli("chat", run_folder, "--max-new-tokens", "3")
    assert result.code == 0, result.err
    # one prompt for each line, and the one that meets the end of the input
    assert result.out.count("> ") >= 3
    assert "Traceback" not in result.err
