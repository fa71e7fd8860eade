from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from qaft.quant.packing import pack_int32, pack_zero_point, unpack_int32, unpack_zero_point

WIDTHS = (1, 3, 7, 8, 9, 31, 32, 33, 64, 100, 576)


def codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, shape, dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_words_are_those_of_compressed_tensors(bits: int, width: int) -> None:
    values = codes(bits, 5, width)
    packed = pack_int32(values, bits)
    assert packed.dtype == torch.int32 and packed.is_contiguous()
    assert torch.equal(packed, pack_to_int32(values, bits))
    assert torch.equal(unpack_int32(packed, bits, width), values)
    assert torch.equal(unpack_from_int32(packed, bits, values.shape), values)


@pytest.mark.parametrize("shape", [(1, 4), (8, 3), (9, 1), (33, 2), (576, 5)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points_are_packed_along_the_output_dimension(bits: int, shape: tuple[int, int]) -> None:
    zero_point = codes(bits, *shape)
    packed = pack_zero_point(zero_point, bits)
    assert packed.is_contiguous()
    assert torch.equal(packed, pack_to_int32(zero_point, bits, packed_dim=0))
    assert torch.equal(unpack_zero_point(packed, bits, shape[0]), zero_point)


def test_the_first_code_of_four_bits_is_the_lowest_nibble() -> None:
    values = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1]], dtype=torch.int8)
    assert pack_int32(values, 4).tolist() == [[0x76543210]]


def test_packing_reads_any_memory_layout() -> None:
    values = codes(4, 32, 16).T
    assert torch.equal(pack_int32(values, 4), pack_int32(values.contiguous(), 4))
    packed = pack_int32(codes(4, 6, 32), 4)
    assert torch.equal(unpack_int32(packed[::2], 4, 32), unpack_int32(packed, 4, 32)[::2])


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 90), st.integers(0, 2**31))
def test_unpacking_inverts_packing(bits: int, rows: int, width: int, seed: int) -> None:
    values = codes(bits, rows, width, seed=seed)
    assert torch.equal(unpack_int32(pack_int32(values, bits), bits, width), values)


@pytest.mark.parametrize("bits", [1, 9])
def test_widths_outside_two_to_eight_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits={bits} must be in \[2, 8\]"):
        pack_int32(codes(4, 2, 8), bits)
    with pytest.raises(ValueError, match=rf"bits={bits} must be in \[2, 8\]"):
        unpack_int32(torch.zeros(2, 1, dtype=torch.int32), bits, 8)


def test_codes_that_are_not_int8_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.int32 \[2, 8\]: must be torch.int8"):
        pack_int32(codes(4, 2, 8).int(), 4)
    with pytest.raises(ValueError, match=r"torch.int8 \[8\]: must be torch.int8 \[out_features, in_features\]"):
        pack_int32(codes(4, 8), 4)


def test_words_that_do_not_fit_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be torch.int32 \[out_features, 3\] for in_features=17 of 4 bits"):
        unpack_int32(torch.zeros(2, 2, dtype=torch.int32), 4, 17)
