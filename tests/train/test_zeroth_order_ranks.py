"""Data parallel zeroth-order training: two processes against one, and the journal that rebuilds any of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zeroth_order_ranks
from safetensors.torch import load_file
from tiny_job import quiet, train
from torch import nn
from two_ranks import run_ranks
from zeroth_order_ranks import CASES, recipe

from qaft.build import restore_run
from qaft.commands.replay import replay_journal
from qaft.errors import TrainingError
from qaft.layers.attach import trainable_parameters, update_buffers
from qaft.train.checkpoint import latest_checkpoint, read_checkpoint
from qaft.train.journal import JOURNAL, read_journal
from qaft.train.replay import check_parameters


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for name in CASES:
        recipe(tiny_llama, folder / name)  # one process writes the rows
    run_ranks(Path(zeroth_order_ranks.__file__), str(folder), str(tiny_llama))
    return folder


def trained(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    return dict(read_checkpoint(checkpoint).trainables)


ALONE: dict[str, dict[str, Any]] = {
    "private": {"directions": 2},
    "shared": {"shared": False},
}


@pytest.mark.parametrize("case", ALONE)
def test_two_ranks_take_the_steps_of_one_process(together: Path, tiny_llama: Path, tmp_path: Path, case: str) -> None:
    """Shared directions: the union of the data. Private ones: one process that divides its rows among two directions."""
    gradient = {**CASES[case]["gradient"], **ALONE[case]}
    run = train(recipe(tiny_llama, tmp_path, gradient=gradient))
    ours, theirs = (read_journal(folder / JOURNAL).records for folder in (together / case / "run", run.folder))
    for a, b in zip(ours, theirs, strict=True):
        assert a.c == pytest.approx(b.c, rel=2e-3, abs=2e-3)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.tokens == b.tokens
    for name, value in trained(run.folder).items():
        torch.testing.assert_close(trained(together / case / "run")[name], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_one_process_rebuilds_from_the_journal_what_two_have_trained(
    together: Path, tiny_llama: Path, tmp_path: Path, case: str
) -> None:
    out = replay_journal(together / case / "run", base=str(tiny_llama), out=tmp_path / "out", console=quiet())
    model = restore_run(out).loaded.model
    rebuilt = {**trainable_parameters(model), **update_buffers(model)}
    for name, value in trained(together / case / "run").items():
        assert torch.equal(rebuilt[name], value)


def test_private_directions_are_twice_as_many_scalars(together: Path) -> None:
    private, shared = (read_journal(together / case / "run" / JOURNAL).records for case in ("private", "shared"))
    assert {len(record.c) for record in private} == {2}
    assert {len(record.c) for record in shared} == {1}


def test_checkpoints_come_with_a_hash_that_all_ranks_have_agreed_on(together: Path) -> None:
    assert sorted(read_journal(together / "private" / "run" / JOURNAL).parameters) == [2, 4, 5]
    assert load_file(together / "private" / "run" / "checkpoint-5" / "trainables.safetensors")


def test_a_rank_with_other_parameters_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(engine: Any, words: list[float]) -> list[list[float]]:
        return [words, words, [words[0], words[1] + 1]]

    monkeypatch.setattr("qaft.train.replay.gathered", gathered)
    run: Any = SimpleNamespace(params={"p": nn.Parameter(torch.ones(3))}, engine=None, journal=SimpleNamespace())
    with pytest.raises(TrainingError, match="after step 7 rank 2 holds other parameters than rank 0"):
        check_parameters(run, 7)
