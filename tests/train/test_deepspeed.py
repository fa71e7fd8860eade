"""Every engine takes the steps of one process, and their checkpoints are one format; two processes train all of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed_ranks
import pytest
import torch
from deepspeed_ranks import DENSE, HALF_ENGINES, HALVES, OPTIMIZERS, PARTITIONED, RESUMED, SAVING, SMALL_BUCKET
from engine_ranks import (
    CLIP,
    LR_RATIO,
    SAVED,
    STEPS,
    Case,
    chosen_cases,
    difference,
    outcome,
    recipe,
    resumable,
    train,
)
from tiny_checkpoint import write_checkpoint
from two_ranks import run_ranks

from qaft.plan import footprint, model_size
from qaft.train.checkpoint import TRAINABLES, latest_checkpoint, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")

LOSS_TOLERANCE, PARAMETER_TOLERANCE = 2e-6, 1e-5
"""Rounding of sums in another order; a rate of 3e-3 and four steps can move a parameter by 1e-2."""

Trained = tuple[Path, Path, dict[str, Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Folder, checkpoint of the base and facts of all runs."""
    folder = tmp_path_factory.mktemp("engines")
    checkpoint = write_checkpoint(folder / "model", dtype=torch.float32)
    for kind, base in {(case.kind, case.base): None for case in [*chosen_cases(), RESUMED]}:
        train(Case(kind, base), checkpoint, folder)
    train(replace(RESUMED, purpose="save"), checkpoint, folder, save_every=SAVED)
    for engine in SAVING:
        resumable(replace(RESUMED, engine=engine, purpose="resume"), replace(RESUMED, purpose="save"), folder)
    run_ranks(Path(deepspeed_ranks.__file__), str(folder), str(checkpoint))
    return folder, checkpoint, json.loads((folder / "facts.json").read_text(encoding="utf-8"))


def assert_agree(folder: Path, case: Case) -> None:
    losses, parameters = difference(outcome(Case(case.kind, case.base), folder), outcome(case, folder))
    assert losses <= LOSS_TOLERANCE
    assert parameters <= PARAMETER_TOLERANCE


@pytest.mark.parametrize("case", chosen_cases(), ids=lambda case: case.name)
def test_two_ranks_equal_one_process_on_the_whole_batch(trained: Trained, case: Case) -> None:
    assert_agree(trained[0], case)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("engine", HALF_ENGINES)
def test_engines_leave_the_dtypes_of_a_16_bit_model_alone(trained: Trained, engine: str, dtype: str) -> None:
    # Between engines of two ranks, which round the same way: one process would add in another order, in 16 bits.
    cases = [replace(RESUMED, engine=name, dtype=dtype) for name in ("ddp", engine)]
    losses, parameters = difference(*(outcome(case, trained[0]) for case in cases))
    assert losses <= LOSS_TOLERANCE
    assert parameters <= PARAMETER_TOLERANCE


@pytest.mark.parametrize("case", chosen_cases(), ids=lambda case: case.name)
def test_norms_before_clipping_are_reported_and_clipping_acts(trained: Trained, case: Case) -> None:
    expected = [row["grad_norm"] for row in outcome(Case(case.kind, case.base), trained[0]).steps]
    assert [row["grad_norm"] for row in outcome(case, trained[0]).steps] == pytest.approx(expected, rel=1e-4)
    assert max(expected) > CLIP or case.kind != "lowrank"


@pytest.mark.parametrize("case", chosen_cases(), ids=lambda case: case.name)
def test_the_ratio_of_learning_rates_survives_every_scheduler_step(trained: Trained, case: Case) -> None:
    rows = outcome(case, trained[0]).steps
    assert len({row["learning_rate"] for row in rows}) == STEPS
    assert [row["learning_rate/v_proj"] / row["learning_rate"] for row in rows] == pytest.approx([LR_RATIO] * STEPS)


@pytest.mark.parametrize("engine", SAVING)
def test_a_run_saved_by_two_ranks_goes_on_in_one_process(trained: Trained, engine: str) -> None:
    folder, checkpoint, _ = trained
    continued = replace(RESUMED, purpose=f"from {engine}")
    resumable(continued, replace(RESUMED, engine=engine, purpose="save"), folder)
    train(continued, checkpoint, folder, save_every=SAVED, resume=True)
    assert_agree(folder, continued)


@pytest.mark.parametrize("engine", SAVING)
def test_a_run_saved_by_one_process_goes_on_in_two_ranks(trained: Trained, engine: str) -> None:
    assert_agree(trained[0], replace(RESUMED, engine=engine, purpose="resume"))


@pytest.mark.parametrize("engine", SAVING)
def test_checkpoints_hold_whole_tensors_and_nothing_else(trained: Trained, engine: str) -> None:
    folder = trained[0]
    ours = latest_checkpoint(folder / replace(RESUMED, engine=engine, purpose="save").name)
    plain = latest_checkpoint(folder / replace(RESUMED, purpose="save").name)
    assert ours and plain
    left, right = read_checkpoint(ours), read_checkpoint(plain)
    assert {n: t.shape for n, t in left.trainables.items()} == {n: t.shape for n, t in right.trainables.items()}
    moments, expected = left.state["optimizer"]["state"], right.state["optimizer"]["state"]
    assert list(moments) == list(expected)
    for index, entry in moments.items():
        assert entry.keys() == expected[index].keys()
        for key, value in entry.items():
            torch.testing.assert_close(value, expected[index][key], rtol=1e-3, atol=1e-6)
    trained_bytes = sum(tensor.nbytes for tensor in left.trainables.values())
    assert (ours / TRAINABLES).stat().st_size < trained_bytes + 4096
    # Two moments per element, a step per parameter, names; the generators' states are 5 kB.
    assert sum(path.stat().st_size for path in ours.iterdir()) < 3 * trained_bytes + 40_000


def test_between_steps_stage_3_holds_nothing_whole_and_afterwards_everything(trained: Trained) -> None:
    facts = trained[2]["partition"]
    assert set(facts["local"]) == {0}
    assert facts["whole"] == facts["released"]
    assert all(math.prod(shape) > 0 for shape in facts["whole"])


@pytest.mark.parametrize("engine", ("zero0", *PARTITIONED))
def test_the_plan_is_what_tensors_hold(trained: Trained, engine: str) -> None:
    folder, checkpoint, facts = trained
    size = model_size(recipe(DENSE, checkpoint, folder))
    held = footprint(size, engine, state=8, world_size=2)
    planned = held.parameters + held.gradients + held.optimizer + held.host
    # Offload keeps two buffers of the largest parameter; partitions are padded; a batch and counters are alive.
    largest, rest = 4 * 64 * 64, 3000
    tolerance = rest + 4 * SMALL_BUCKET + (2 * largest if engine.endswith("offload") else 0)
    assert facts["held"][engine] == pytest.approx(planned, abs=tolerance)
    assert tolerance < 0.3 * planned


@pytest.mark.parametrize("optimizer", [options["name"] for options in OPTIMIZERS])
@pytest.mark.parametrize("engine", ("zero0", *PARTITIONED))
def test_gathered_state_of_odd_sizes_and_two_groups_is_complete(trained: Trained, engine: str, optimizer: str) -> None:
    assert trained[2]["continues"][f"{engine} {optimizer}"]


@pytest.mark.parametrize("engine", ("zero0", *PARTITIONED))
def test_a_gradient_that_is_not_finite_on_one_rank_steps_none(trained: Trained, engine: str) -> None:
    facts = trained[2]["refuses"][engine]
    assert not facts["stepped"]
    assert not math.isfinite(facts["norm"])
    assert facts["kept"]
    assert facts["then"]
    assert math.isfinite(facts["after"])
