from __future__ import annotations

from typing import Any

import pytest
import torch

from qaft.quant import CODE_BOOKS, QUANTIZERS, Affine, build_quantizer
from qaft.quant.codebook import CodeBook
from qaft.sections import CODE_BOOK_KINDS, GridSection


def test_an_int_section_gives_an_affine_grid_with_its_options() -> None:
    section = GridSection(kind="int", bits=3, group_size=32, symmetric=False)
    grid = build_quantizer(section, scale_dtype=torch.bfloat16)
    assert isinstance(grid, Affine)
    assert (grid.bits, grid.group_size, grid.symmetric, grid.scale_dtype) == (3, 32, False, torch.bfloat16)


@pytest.mark.parametrize("group_size", [None, -1])
def test_no_group_size_means_one_scale_per_output_channel(group_size: int | None) -> None:
    grid = build_quantizer(GridSection(group_size=group_size), scale_dtype=torch.float32)
    assert grid.group_size is None
    assert grid.quantize(torch.randn(3, 40)).scale.shape == (3, 1)


@pytest.mark.parametrize("kind", CODE_BOOKS)
def test_a_section_with_a_code_book_gives_blocks_of_64(kind: str) -> None:
    grid = build_quantizer(GridSection.model_validate({"kind": kind}), scale_dtype=torch.bfloat16)
    assert isinstance(grid, CodeBook)
    assert (type(grid), grid.kind, grid.group_size) == (CODE_BOOKS[kind], kind, 64)
    assert set(CODE_BOOKS) == set(CODE_BOOK_KINDS)
    assert grid.quantize(torch.randn(2, 64)).scale.dtype == torch.float32


@pytest.mark.parametrize("kind", CODE_BOOKS)
@pytest.mark.parametrize("group_size", [None, 48])
def test_block_sizes_that_bitsandbytes_lacks_are_refused(group_size: int | None, kind: Any) -> None:
    section = GridSection(kind=kind, group_size=group_size)
    with pytest.raises(ValueError, match="must be one of 32, 64, 128"):
        build_quantizer(section, scale_dtype=torch.float32)


def test_an_int_section_carries_range_clip_and_mask() -> None:
    grid = build_quantizer(GridSection(symmetric=False, clip=0.95, ste="trust"), scale_dtype=torch.float32)
    assert isinstance(grid, Affine)
    assert (grid.range.kind, grid.range.clip, grid.ste) == ("absmax", 0.95, "trust")


@pytest.mark.parametrize(("kind", "group_size"), [("q4_0", 32), ("q8_0", 32), ("mxfp4", 32), ("nvfp4", 16)])
def test_a_block_format_has_its_own_group_size_and_carries_the_mask(kind: str, group_size: int) -> None:
    grid = build_quantizer(GridSection.model_validate({"kind": kind, "ste": "identity"}), scale_dtype=torch.bfloat16)
    assert type(grid) is QUANTIZERS[kind]
    assert grid.group_size == group_size and "ste='identity'" in grid.extra_repr()
