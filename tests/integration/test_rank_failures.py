"""A rank that fails ends the job with its own error and exit code; what was saved stays, and no process does."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from launched import DEEPSPEED, FAULTY, RECIPE, ROOT, TORCHRUN, TRAIN, free_port, own_lines, records, run, start
from tiny_job import quiet

from qaft.commands.train import train_and_export
from qaft.recipe import load_recipe
from qaft.train.checkpoint import latest_checkpoint, read_checkpoint

SHORT = ["train.steps=6", "train.save_every=2", "data.valid=null"]
ENDLESS = ["train.steps=5000", "train.save_every=2", "data.valid=null"]


def on_two_ranks(launcher: str) -> list[str]:
    number, command = {"torchrun": ("--nproc_per_node", TORCHRUN), "deepspeed": ("--num_gpus", DEEPSPEED)}[launcher]
    return [*command, number, "2", "--master_port", str(free_port())]


def test_a_rank_that_is_killed_inside_a_step_costs_only_that_step(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    launcher = on_two_ranks("torchrun")
    code, output = run([*launcher, FAULTY, RECIPE, *SHORT, "train.output=killed"], workplace, {"FAULT": "1 4 kill"})
    assert code == 1, output  # torchrun's own, whatever the rank's was
    assert "exitcode  : -9" in output
    assert not own_lines(output)
    saved = latest_checkpoint(workplace / "killed")
    assert saved is not None
    assert saved.name == "checkpoint-4"
    for folder in ("killed", "undisturbed"):
        train_and_export(load_recipe(RECIPE, [*SHORT, f"train.output={folder}", "train.resume=true"]), quiet())
    resumed, expected = records(workplace / "killed"), records(workplace / "undisturbed")
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5, 6]
    for line, reference in zip(resumed, expected, strict=True):
        # Two ranks to step 4 and one process after it, against one process.
        assert line == pytest.approx(reference, rel=2e-6)


def test_the_error_and_the_exit_code_are_those_of_the_rank_that_failed(workplace: Path) -> None:
    launcher = on_two_ranks("deepspeed")
    arguments = [RECIPE, *SHORT, "train.output=broken", "--deepspeed", "zero2"]
    code, output = run([*launcher, FAULTY, *arguments], workplace, {"FAULT": "1 3 data"})
    assert code == 4, output
    assert own_lines(output) == ["rank 1: DataError: rows.jsonl, line 7: broken"]
    assert "Traceback" not in output
    saved = latest_checkpoint(workplace / "broken")
    assert saved is not None
    assert saved.name == "checkpoint-2"


def test_sigterm_to_the_script_saves_on_all_ranks(workplace: Path) -> None:
    command = [
        str(ROOT / "launch" / "multi_gpu.sh"),
        RECIPE,
        *ENDLESS,
        "train.output=terminated",
        "--deepspeed",
        "zero2",
    ]
    environment = {"GPUS": "2", "LAUNCHER": "deepspeed", "MASTER_PORT": str(free_port()), "PYTHON": sys.executable}
    with start(command, workplace, environment) as job:
        job.wait_for(workplace / "terminated" / "checkpoint-2")
        job.launcher.send_signal(signal.SIGTERM)
        code, output = job.finish()
        assert code == 143, output
        assert not job.processes()
    assert output.count("SIGTERM: saved") == 1
    assert latest_checkpoint(workplace / "terminated") is not None
    assert not own_lines(output)


def test_ranks_save_and_end_when_their_launcher_is_killed(workplace: Path) -> None:
    with start([*on_two_ranks("torchrun"), TRAIN, RECIPE, *ENDLESS, "train.output=orphaned"], workplace) as job:
        job.wait_for(workplace / "orphaned" / "checkpoint-2")
        job.launcher.kill()
        assert not job.wait_for_end()
        _, output = job.finish()
    last = max(line["step"] for line in records(workplace / "orphaned"))
    saved = latest_checkpoint(workplace / "orphaned")
    assert saved is not None
    assert read_checkpoint(saved).step == last
    assert output.count("SIGTERM: saved") == 1
