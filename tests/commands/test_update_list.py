"""What ``qaft list updates`` says of each update."""

from __future__ import annotations

import pytest
from rich.console import Console

from qaft.commands.update_list import num_trainable, update_table
from qaft.compat.exports import UNBOUNDED_RANK
from qaft.updates import UPDATES

COUNTS = {
    "bank": 64 * 64 * 4096,
    "dense": 1_073_741_824,
    "gsoft": 32 * 4096 * 31 + 64 * 4096,  # q and v share their rotation
    "ia3": 262_144,
    "linchain": 4_194_304 + 64 * 2 * 64,
    "lowrank": 4_194_304,
    "roco": 64 * 4 * 4096,
    "sift": 64 * 167_773,
    "ssb": 524_288,
    "ssl": 262_144,
}


@pytest.mark.parametrize("kind", UPDATES)
def test_the_count_is_that_of_llama_2_7b_with_the_default_options(kind: str) -> None:
    assert num_trainable(UPDATES[kind]) == COUNTS[kind]


def test_every_update_is_listed_with_formula_source_count_and_exports() -> None:
    console = Console(width=300, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(update_table())
    lines = captured.get().splitlines()
    for kind, cls in UPDATES.items():
        (line,) = (line for line in lines if line.split()[1:2] == [kind])
        assert all(text in line for text in (cls.formula, cls.source, f"{COUNTS[kind]:,}"))
        assert ("LoRA" in line.replace("LoRA, arXiv", "")) == (kind not in UNBOUNDED_RANK)


def test_updates_of_any_rank_are_those_that_a_recipe_refuses_to_export_as_lora() -> None:
    assert {kind for kind, cls in UPDATES.items() if not cls.has_low_rank()} == set(UNBOUNDED_RANK)
