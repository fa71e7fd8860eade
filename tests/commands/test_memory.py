"""Out of memory in any stage is one message with what was tried and what takes less, and nothing saved is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import job, write_job

from qaft.cli import main
from qaft.commands.memory import memory_for
from qaft.errors import OutOfMemoryError
from qaft.layers.adapted import AdaptedLinear
from qaft.models.layers import LayerBuilder
from qaft.train.checkpoint import latest_checkpoint

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB"


def no_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError(CUDA)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    assert end.value.code == 1
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("OutOfMemoryError: ")
    assert f"({CUDA})" in line
    return line


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    raw = job(tiny_llama, folder, train={"steps": 3, "save_every": 1, "batch_size": 4, "resume": True})
    return write_job(folder / "recipe.yaml", raw)


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    """A finished run that no test changes."""
    folder = recipe.parent / "finished"
    with pytest.raises(SystemExit) as end:
        main(["train", str(recipe), f"train.output={folder}"])
    assert not end.value.code
    return folder


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_says_what_was_tried_and_keeps_the_checkpoint(
    checkpointing: bool, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, forward = tmp_path / "run", AdaptedLinear.forward

    def limited(self: AdaptedLinear, x: torch.Tensor) -> torch.Tensor:
        if (out / "checkpoint-2").exists():
            no_memory()
        return forward(self, x)

    overrides = (f"train.output={out}", f"train.gradient_checkpointing={str(checkpointing).lower()}")
    with monkeypatch.context() as patched:
        patched.setattr(AdaptedLinear, "forward", limited)
        line = refused(capsys, "train", recipe, *overrides)
    tried = f"train.batch_size=4, data.max_length=64, train.gradient_checkpointing={str(checkpointing).lower()}"
    assert f"training: not enough memory with {tried}" in line
    assert ("set train.gradient_checkpointing=true" in line) is not checkpointing
    for advice in ("lower train.batch_size", "raise train.grad_accumulation", "lower data.max_length"):
        assert advice in line
    assert f"Last good checkpoint: {out / 'checkpoint-2'}" in line
    # As the message says: recomputing activations is no other training.
    with pytest.raises(SystemExit) as end:
        main(["train", str(recipe), *overrides, "train.gradient_checkpointing=true"])
    assert not end.value.code
    assert latest_checkpoint(out) == out / "checkpoint-3"


def test_loading_names_the_model_and_its_storage(
    recipe: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(LayerBuilder, "build", no_memory)
    line = refused(capsys, "train", recipe, f"train.output={tmp_path / 'run'}")
    assert f"loading: not enough memory with model.name={tiny_llama}, model.storage=fp32" in line
    assert "model.storage: nf4 or int4" in line


STAGES = {
    "evaluation": ("qaft.commands.evaluate.samples_perplexity", ["eval"], "perplexity: not enough memory"),
    "comparison": ("qaft.commands.diff.logits_of", ["diff", "{run}"], "computing logits of {run}: not enough memory"),
    "loading": ("qaft.commands.open.restore_run", ["eval"], "loading: not enough memory with model={run}"),
    "export": ("qaft.export.verify.float_logits", ["export", "--format", "merged"], "exporting {run}/export-merged"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_other_stage_is_named(
    stage: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, (verb, *rest), message = STAGES[stage]
    monkeypatch.setattr(place, no_memory)
    line = refused(capsys, verb, run, *(text.format(run=run) for text in rest))
    assert message.format(run=run) in line
    assert not list(run.glob("export-*"))


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "DefaultCPUAllocator: can't allocate memory: you tried"])
def test_allocations_of_libraries_count_too_and_other_errors_pass(text: str) -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"here: not enough memory \(.*\); less"),
        memory_for("here", {}, lambda: "less"),
    ):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="shapes"), memory_for("here", {}, lambda: "less"):
        raise RuntimeError("shapes differ")
