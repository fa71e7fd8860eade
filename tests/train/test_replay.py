"""Journals: the same bits from a replay, from a continued run and from a run that never stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_job import job, quiet, train
from torch import Tensor

from qaft.build import Run, restore_run
from qaft.commands.replay import replay_journal
from qaft.errors import IncompatibleError, RecipeError, TrainingError
from qaft.gradients.base import Closure, GradientEstimate, Parameters
from qaft.gradients.two_point import TwoPointSource
from qaft.layers.attach import trainable_parameters
from qaft.train.journal import JOURNAL, base_digest, read_journal

BANK = {"kind": "bank", "rank": 2, "blocks": 2}
CASES: dict[str, dict[str, Any]] = {
    "lozo": {"update": BANK, "gradient": {"kind": "lozo", "interval": 2}},
    "lozo_m": {"update": BANK, "gradient": {"kind": "lozo_m", "interval": 2}},
    "lozo, several directions": {"update": BANK, "gradient": {"kind": "lozo", "interval": 2, "directions": 3}},
    "lozo, adamw, clipped": {
        "update": BANK,
        "gradient": {"kind": "lozo", "interval": 2},
        "optim": {"name": "adamw", "clip": 1.0, "weight_decay": 0.1},
    },
    "lozo, accumulation": {
        "update": BANK,
        "gradient": {"kind": "lozo", "interval": 2},
        "train": {"batch_size": 4, "grad_accumulation": 2},
    },
    "lozo, nf4": {"update": BANK, "gradient": {"kind": "lozo", "interval": 2}, "model": {"storage": "nf4"}},
    "lozo, int4 grid": {
        "update": BANK,
        "gradient": {"kind": "lozo", "interval": 2},
        "qat": {"weights": {"group_size": 32}},
    },
    "mezo": {"update": {"kind": "dense"}, "gradient": {"kind": "mezo"}},
    "spsa": {"update": {"kind": "roco", "rows": 2, "columns": 2}, "gradient": {"kind": "spsa"}},
}


def recipe(checkpoint: Path, folder: Path, case: str = "lozo", **train: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    given = CASES[case]
    return job(
        checkpoint,
        folder,
        **{
            **given,
            "optim": {"name": "sgd", "lr": 3e-4, "clip": None, "schedule": "cosine", **given.get("optim", {})},
            "train": {"steps": 6, "save_every": 2, "keep": 9, **given.get("train", {}), **train},
        },
    )


def parameters(run: Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable_parameters(run.loaded.model).items()}


def assert_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: Any) -> Run:
    return train(recipe(tiny_llama, tmp_path_factory.mktemp("finished")))


@pytest.mark.parametrize("case", CASES)
def test_a_replay_without_data_gives_the_trained_bits(tiny_llama: Path, tmp_path: Path, case: str) -> None:
    raw = recipe(tiny_llama, tmp_path, case)
    run = train(raw)
    (tmp_path / "rows.jsonl").unlink()
    out = replay_journal(run.folder, base=str(tiny_llama), out=tmp_path / "again", console=quiet())
    assert_same_bits(parameters(restore_run(out)), parameters(run))
    assert any(float(p.abs().max()) > 0 for p in parameters(run).values())


class Killed(Exception):
    pass


def kill_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], None]:
    estimate = TwoPointSource.__call__

    def call(self: TwoPointSource, closure: Closure, params: Parameters) -> GradientEstimate:
        if closure.step == step:
            raise Killed
        return estimate(self, closure, params)

    monkeypatch.setattr(TwoPointSource, "__call__", call)
    return monkeypatch.undo


@pytest.mark.parametrize("case", ["lozo", "lozo_m", "lozo, adamw, clipped"])
@pytest.mark.parametrize("save_every", [2, None])
def test_a_killed_run_goes_on_from_its_last_step_to_the_same_bits(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, save_every: int | None
) -> None:
    whole = train(recipe(tiny_llama, tmp_path / "whole", case))
    undo = kill_in_step(monkeypatch, 5)
    with pytest.raises(Killed):
        train(recipe(tiny_llama, tmp_path / "killed", case, save_every=save_every))
    undo()
    resumed = train(recipe(tiny_llama, tmp_path / "killed", case, save_every=save_every, resume=True))
    assert_same_bits(parameters(resumed), parameters(whole))
    ours, theirs = (read_journal(run.folder / JOURNAL).records for run in (resumed, whole))
    assert ours == theirs


def test_a_snapshot_bounds_the_replay(finished: Run, tiny_llama: Path, tmp_path: Path) -> None:
    out = replay_journal(
        finished.folder,
        base=str(tiny_llama),
        out=tmp_path / "out",
        snapshot=finished.folder / "checkpoint-4",
        console=quiet(),
    )
    assert_same_bits(parameters(restore_run(out)), parameters(finished))


def test_a_replay_can_stop_at_any_step(finished: Run, tiny_llama: Path, tmp_path: Path) -> None:
    out = replay_journal(finished.folder, base=str(tiny_llama), out=tmp_path / "out", until=3, console=quiet())
    again = replay_journal(
        out, base=str(tiny_llama), out=tmp_path / "rest", snapshot=out / "checkpoint-3", console=quiet()
    )
    assert_same_bits(parameters(restore_run(again)), parameters(finished))


def test_shuffled_scalars_give_other_parameters_of_the_same_size(
    finished: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    out = replay_journal(finished.folder, base=str(tiny_llama), out=tmp_path / "out", shuffle=1, console=quiet())
    real, control = (torch.cat([p.flatten() for p in parameters(run).values()]) for run in (finished, restore_run(out)))
    assert not torch.equal(real, control)
    assert not (out / JOURNAL).exists()


def damaged(run: Run, folder: Path, damage: Callable[[list[str]], list[str]]) -> Path:
    lines = (run.folder / JOURNAL).read_text().splitlines(keepends=True)
    path = folder / "damaged.jsonl"
    path.write_text("".join(damage(lines)))
    return path


def test_damage_covers_what_it_should(finished: Run) -> None:
    # Lines 4, 7 and 10 are the hashes that come with the checkpoints after steps 2, 4 and 6.
    lines = [json.loads(line) for line in (finished.folder / JOURNAL).read_text().splitlines()]
    assert [i for i, line in enumerate(lines, start=1) if "parameters" in line] == [4, 7, 10]


def changed_line(lines: list[str]) -> list[str]:
    content = json.loads(lines[4])
    content["c"] = [-value for value in content["c"]]
    return [*lines[:4], json.dumps(content) + "\n", *lines[5:]]


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (changed_line, ["line 5 (after 2 finished steps)", "was changed", "--until 2"]),
        (lambda lines: [*lines[:5], lines[5][:30]], ["line 6 (after 3 finished steps)", "cut short", "--until 3"]),
        (lambda lines: [*lines[:4], *lines[5:]], ["line 5 (after 2 finished steps)", "was changed"]),
    ],
    ids=["changed", "cut", "lost"],
)
def test_damaged_lines_are_named_and_everything_before_them_can_be_used(
    finished: Run, tiny_llama: Path, tmp_path: Path, damage: Any, fragments: list[str]
) -> None:
    path = damaged(finished, tmp_path, damage)
    with pytest.raises(TrainingError) as error:
        replay_journal(path, base=str(tiny_llama), out=tmp_path / "out", console=quiet())
    for fragment in fragments:
        assert fragment in str(error.value)
    replay_journal(path, base=str(tiny_llama), out=tmp_path / "out", until=2, console=quiet())


def test_a_damaged_header_is_refused(finished: Run, tiny_llama: Path, tmp_path: Path) -> None:
    path = damaged(finished, tmp_path, lambda lines: [lines[0].replace('"lr": 0.0003', '"lr": 0.0004'), *lines[1:]])
    with pytest.raises(TrainingError, match="its first line was changed"):
        replay_journal(path, base=str(tiny_llama), out=tmp_path / "out", console=quiet())


def test_a_run_goes_on_before_a_damaged_line(tiny_llama: Path, tmp_path: Path, finished: Run) -> None:
    raw = recipe(tiny_llama, tmp_path, save_every=None)
    run = train(raw)
    (run.folder / "checkpoint-6" / "manifest.json").unlink()
    path = run.folder / JOURNAL
    path.write_text(path.read_text()[:-150])
    with pytest.warns(UserWarning, match="checkpoint-6 is passed over"):
        again = train({**raw, "train": {**raw["train"], "resume": True}})
    assert_same_bits(parameters(again), parameters(finished))


def test_a_journal_of_another_base_is_refused(finished: Run, tiny_llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values()))[0, 0] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match="was written on a base with digest"):
        replay_journal(finished.folder, base=str(other), out=tmp_path / "out", console=quiet())


def test_a_hash_that_is_not_reached_is_an_error(
    finished: Run, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qaft.commands.replay.parameters_digest", lambda _: "0" * 16)
    with pytest.raises(TrainingError, match="after step 2 the parameters have the hash 0000"):
        replay_journal(finished.folder, base=str(tiny_llama), out=tmp_path / "out", console=quiet())


def test_a_folder_with_a_journal_is_not_overwritten(tiny_llama: Path, tmp_path: Path, finished: Run) -> None:
    raw = recipe(tiny_llama, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / JOURNAL).write_text((finished.folder / JOURNAL).read_text())
    with pytest.raises(RecipeError, match=r"holds journal\.jsonl of an earlier run"):
        train(raw)


def test_the_base_has_the_same_bytes_after_training(finished: Run) -> None:
    header = read_journal(finished.folder / JOURNAL).header
    assert base_digest(finished.loaded.model) == header.base


def test_a_step_takes_less_than_400_bytes(finished: Run) -> None:
    lines = (finished.folder / JOURNAL).read_text().splitlines()[1:]
    assert max(map(len, lines)) < 400
