from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import RANK_OPTIONS, TinyBatches, TwoPoint, make_run

from qaft.gradients.backprop import Backprop
from qaft.train.checkpoint import latest_checkpoint, read_checkpoint
from qaft.train.evaluation import evaluate
from qaft.train.loop import fit
from qaft.train.resume import start_state


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """Folder and exit codes of two processes that train together (see ``tiny_run.run_ranks``)."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, tiny_run.__file__, str(folder)],
            env={**tiny_run.ENVIRONMENT, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        # A rank that fails leaves the other one waiting for it.
        return folder, [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("source", [Backprop(), TwoPoint()], ids=["backprop", "two_point"])
def test_two_ranks_with_two_micro_batches_equal_one_process(
    ranks: tuple[Path, list[int]], tmp_path: Path, source: Any
) -> None:
    folder = ranks[0] / {Backprop: "backprop", TwoPoint: "two_point"}[type(source)]
    single = make_run(tmp_path, source=source, **RANK_OPTIONS)
    fit(single, start_state(single))
    together = read_checkpoint(folder / "checkpoint-4").trainables
    for name, param in single.params.items():
        # A two-point difference enlarges the rounding of the loss by 1 / 2 eps = 50.
        torch.testing.assert_close(together[name], param.detach(), rtol=0, atol=1e-6 if source.needs_backward else 1e-4)
    ours = [line for line in records(folder) if "loss" in line]
    for line, expected in zip(ours, records(tmp_path), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5 if source.needs_backward else 1e-3)
        assert line["tokens"] == expected["tokens"]


def test_evaluation_is_over_the_batches_of_all_ranks_even_of_unequal_number(
    ranks: tuple[Path, list[int]], tmp_path: Path
) -> None:
    folder = ranks[0] / "backprop"
    single = make_run(tmp_path, **RANK_OPTIONS)
    for name, tensor in read_checkpoint(folder / "checkpoint-4").trainables.items():
        single.params[name].data.copy_(tensor)
    parts = [list(TinyBatches(steps=3, rank=rank, world=2).from_step(0))[: 3 - rank] for rank in range(2)]
    expected = evaluate(single.engine, [*parts[0], *parts[1]])
    (line,) = [line for line in records(folder) if "eval_loss" in line]
    assert line["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_signal_to_one_rank_stops_all_of_them_at_the_same_step(ranks: tuple[Path, list[int]]) -> None:
    folder, exit_codes = ranks
    assert exit_codes == [143, 143]
    assert latest_checkpoint(folder / "stopped") == folder / "stopped" / "checkpoint-2"
