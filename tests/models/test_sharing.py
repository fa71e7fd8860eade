"""One rank reads, the other receives the same bytes and needs no more memory than they take."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import resident
import torch
from tiny_checkpoint import write_checkpoint
from two_ranks import run_ranks

SCRIPT = Path(__file__).with_name("load_in_ranks.py")
LARGE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
MIB = 2**20


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Folder of the checkpoints, and what each of two ranks has to say; a rank 1 that reads a weight fails."""
    folder = tmp_path_factory.mktemp("sharing")
    write_checkpoint(folder / "untied", tied=False)
    write_checkpoint(folder / "tied", tied=True)
    write_checkpoint(folder / "large", **LARGE)
    run_ranks(SCRIPT, str(folder), environment=resident.ALLOCATOR)
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def test_both_ranks_hold_the_same_bytes_without_the_second_one_reading(ranks: tuple[Path, list[Any]]) -> None:
    first, second = (facts["digests"] for facts in ranks[1])
    assert first == second


@pytest.mark.parametrize("family", ["untied", "tied"])
def test_these_are_the_bytes_of_a_process_that_loads_alone(
    ranks: tuple[Path, list[Any]], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setitem(os.environ, "RANK", "0")
    import load_in_ranks

    for name in load_in_ranks.LOADS:
        alone = load_in_ranks.digests(load_in_ranks.load(ranks[0] / family, name, share=False))
        assert ranks[1][1]["digests"][f"{family} {name}"] == alone


def test_a_receiving_rank_peaks_at_the_packed_model_and_a_layer(ranks: tuple[Path, list[Any]]) -> None:
    folder, facts = ranks
    if facts[1]["memory"] is None:
        pytest.skip("this system does not let a process reset its memory counters")
    measured = facts[1]["memory"]
    dense = (folder / "large" / "model.safetensors").stat().st_size
    layer = dense / LARGE["num_hidden_layers"]
    # The Python objects of a model and pages that are touched in part.
    bound = measured["size"] + layer + 8 * MIB
    assert bound < 0.7 * dense  # otherwise the bound would prove nothing
    assert measured["peak"] <= bound


def test_an_error_of_the_reading_rank_is_raised_by_both(ranks: tuple[Path, list[Any]]) -> None:
    first, second = (facts["error"] for facts in ranks[1])
    assert "missing: no such folder" in first
    assert first == second


def test_values_are_those_of_rank_0_unless_a_rank_works_alone(ranks: tuple[Path, list[Any]]) -> None:
    assert [facts["value"] for facts in ranks[1]] == [0, 0]
    assert [facts["alone"] for facts in ranks[1]] == [0, 1]


def test_a_single_process_makes_everything_itself() -> None:
    from qaft.models.sharing import Sharing

    sharing = Sharing(torch.device("cpu"), active=True)
    tensor, module = torch.ones(2), torch.nn.Identity()
    assert sharing.reads
    assert sharing.tensor(lambda: tensor) is tensor
    assert sharing.module(lambda: module) is module
