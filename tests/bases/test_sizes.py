"""Sizes from shapes are the bytes of the buffers that are really made."""

from __future__ import annotations

import pytest
import torch

from qaft.bases import STORAGES, build_base
from qaft.bases.sizes import storage_bytes
from qaft.quant.affine import Affine

GRIDS = {
    "channel": Affine(bits=4, group_size=None, scale_dtype=torch.bfloat16),
    "groups": Affine(bits=4, group_size=32, scale_dtype=torch.float32),
    "zero points": Affine(bits=8, group_size=32, symmetric=False, scale_dtype=torch.bfloat16),
    "odd width": Affine(bits=3, group_size=16, symmetric=False),
}


def stored(storage: str, shape: tuple[int, int], **options: object) -> int:
    base = build_base(storage, torch.randn(shape), None, dtype=torch.bfloat16, **options)  # type: ignore[arg-type]
    return sum(buffer.nbytes for buffer in base.buffers())


@pytest.mark.parametrize("shape", [(48, 96), (7, 160)])
@pytest.mark.parametrize("storage", [name for name in STORAGES if name not in ("int4", "int8_group")])
def test_dense_and_bitsandbytes_layers(storage: str, shape: tuple[int, int]) -> None:
    assert storage_bytes(storage, *shape) == stored(storage, shape)


@pytest.mark.parametrize("shape", [(64, 64), (300, 256)])
def test_scales_that_are_quantized_too(shape: tuple[int, int]) -> None:
    assert storage_bytes("nf4", *shape, double_quant=True) == stored("nf4", shape, double_quant=True)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", [(48, 96), (7, 160)])
def test_affine_layers(grid: str, shape: tuple[int, int]) -> None:
    expected = stored("int4", shape, grid_quantizer=GRIDS[grid])
    assert storage_bytes("int4", *shape, quantizer=GRIDS[grid]) == expected


@pytest.mark.parametrize(("storage", "message"), [("int5", "not known"), ("int4", "needs a quantizer")])
def test_what_cannot_be_stored_has_no_size(storage: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        storage_bytes(storage, 8, 8)
