"""The zeroth-order properties whose specification counts steps in thousands: minutes, run by ``make test-long``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_replay import BANK, Killed, assert_same_bits, kill_in_step, parameters
from tiny_job import job, quiet, train

from qaft.build import build_run, restore_run
from qaft.commands.replay import replay_journal
from qaft.recipe import parse_recipe
from qaft.train.journal import JOURNAL, base_digest, read_journal

pytestmark = pytest.mark.long

LOZO: dict[str, Any] = {
    "model": {"storage": "nf4"},
    "select": {"kind": "patterns", "targets": ["q_proj", "v_proj"]},
    "update": BANK,
    "gradient": {"kind": "lozo", "interval": 50, "epsilon": 2.0**-10},
    "optim": {"name": "sgd", "lr": 3e-5, "clip": None, "schedule": "cosine"},
}


def recipe(checkpoint: Path, folder: Path, **train: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    raw = job(checkpoint, folder, **LOZO, train={"batch_size": 1, "log_every": 100, **train})
    del raw["data"]["valid"]
    return raw


def test_7_ten_thousand_steps_write_nothing_to_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    raw = recipe(tiny_llama, tmp_path, steps=10_000)
    before = build_run(parse_recipe(raw))
    run = train(raw)
    assert base_digest(run.loaded.model) == base_digest(before.loaded.model)
    trained, start = parameters(run), parameters(before)
    assert all(not trained[name].equal(start[name]) for name in start)


def test_10_two_thousand_steps_are_the_same_bits_whole_killed_in_the_middle_and_replayed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(recipe(tiny_llama, tmp_path / "whole", steps=2_000))
    undo = kill_in_step(monkeypatch, 1_000)
    with pytest.raises(Killed):
        train(recipe(tiny_llama, tmp_path / "killed", steps=2_000, save_every=300))
    undo()
    resumed = train(recipe(tiny_llama, tmp_path / "killed", steps=2_000, save_every=300, resume=True))
    assert_same_bits(parameters(resumed), parameters(whole))
    assert len(read_journal(resumed.folder / JOURNAL).records) == 2_000
    out = replay_journal(whole.folder, base=str(tiny_llama), out=tmp_path / "again", console=quiet())
    assert_same_bits(parameters(restore_run(out)), parameters(whole))
