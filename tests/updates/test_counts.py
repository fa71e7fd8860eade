"""Trainable parameters against those that the methods' papers and official codes report."""

from __future__ import annotations

import pytest
import torch

from qaft.bases.base import LinearSpec
from qaft.updates import UPDATES

ROBERTA = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
ROBERTA_KVU = [(768, 768)] * 2 + [(3072, 768)]
ROBERTA_LARGE_ATTENTION = [(1024, 1024)] * 4
LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def count(kind: str, shapes: list[tuple[int, int]], layers: int, **options) -> int:
    total = 0
    for o, i in shapes:
        spec = LinearSpec(name="layer", out_features=o, in_features=i)
        total += UPDATES[kind](spec, **options).num_trainable()
    return layers * total


@pytest.mark.parametrize(
    ("kind", "shapes", "layers", "options", "expected"),
    [
        ("roco", ROBERTA, 12, {"rows": 3}, 248_832),  # RoCoFT, "0.249 M"
        ("roco", LLAMA_7B, 32, {"rows": 3}, 3_416_064),
        ("roco", LLAMA_7B, 32, {"columns": 3}, 4_079_616),
        ("lowrank", [(768, 768)] * 2, 12, {"rank": 8}, 294_912),  # LoRA on q and v of RoBERTa-base
        ("lowrank", [(4096, 4096)] * 2, 32, {"rank": 8}, 4_194_304),  # QV LoRA on Llama-2-7B
        ("lowrank", LLAMA_7B, 32, {"rank": 16}, 39_976_960),
        ("linchain", LLAMA_7B, 32, {"rank": 8, "depth": 2}, 19_988_480 + 2 * 14_336),
        ("ssl", ROBERTA_KVU, 12, {}, 27_648),  # See Further, "0.22 per mille"
        ("ia3", ROBERTA_KVU, 12, {}, 55_296),  # "0.44 per mille"
        ("ssb", ROBERTA_KVU, 12, {}, 82_944),  # "0.66 per mille"
        ("ssb", LLAMA_7B, 32, {}, 1_138_688 + 1_359_872),
        ("sift", ROBERTA_LARGE_ATTENTION, 24, {"rate": 0.008, "choose": "random"}, 805_344),  # SIFT, "0.8 M"
        ("gsoft", LLAMA_7B, 32, {"block": 32}, 35_299_328 + 1_359_872),
    ],
)
def test_parameter_counts_are_the_published_ones(kind, shapes, layers, options, expected) -> None:
    assert count(kind, shapes, layers, **options) == expected


def test_gsoft_has_the_published_count_less_the_entries_that_antisymmetry_repeats() -> None:
    # The official code stores whole blocks, of which S = (A - A^T) / 2 is used: b (b + 1) / 2 entries say nothing.
    block, blocks = 8, 12 * 2 * sum(i // 8 for _, i in ROBERTA)
    repeated = blocks * block * (block + 1) // 2
    assert count("gsoft", ROBERTA, 12, block=block) + repeated == 1_410_048


def test_sift_of_blocks_trains_about_as_much_as_sift_of_entries() -> None:
    options = {"rate": 0.01, "choose": "random"}
    entries = count("sift", [(4096, 4096)], 1, **options)
    blocks = count("sift", [(4096, 4096)], 1, entries="block64", **options)
    assert entries == 167_773
    assert blocks == 64 * 2622
    assert abs(blocks - entries) < 64


@pytest.mark.parametrize("kind", ["ia3", "ssb", "ssl"])
def test_scalings_are_kept_in_the_dtype_of_the_run(kind: str) -> None:
    spec = LinearSpec(name="layer", out_features=3, in_features=4, dtype=torch.bfloat16)
    assert {p.dtype for p in UPDATES[kind](spec).parameters()} == {torch.bfloat16}
