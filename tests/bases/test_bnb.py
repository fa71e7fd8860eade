"""bitsandbytes storage: the library's own codes, its published facts, and its stored form."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from qaft.bases import build_base
from qaft.bases.bnb import _PIECE, FourBitBase, Int8Base, dequantize_stored

FOUR_BIT = ["nf4", "fp4"]


@pytest.fixture
def weight(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(96, 320, generator=generator)


@pytest.mark.parametrize("quant_type", FOUR_BIT)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(96, 320), (5, 172), (3, 7), (257, _PIECE // 64)], ids=str)
def test_four_bit_weight_equals_the_library(
    quant_type: str, double_quant: bool, shape: tuple[int, int], generator: torch.Generator
) -> None:
    weight = torch.randn(shape, generator=generator)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=double_quant)
    base = FourBitBase.from_weight(weight, None, dtype=torch.float32, quant_type=quant_type, double_quant=double_quant)  # pyright: ignore[reportArgumentType]
    assert torch.equal(base.packed, packed)
    assert torch.equal(base.absmax, state.absmax)
    assert torch.equal(base.dequantize(), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("quant_type", FOUR_BIT)
@pytest.mark.parametrize("shape", [(8, 32), (64, 96), (8, 160), (5, 172), (3, 7), (8, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_levels_times_the_scale_of_their_block_in_storage_order(
    quant_type: str, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    base = build_base(quant_type, torch.randn(shape, generator=generator), None, dtype=dtype)
    size = shape[0] * shape[1]
    codes = torch.stack([base.packed.flatten() >> 4, base.packed.flatten() & 0xF], dim=-1).flatten()[:size]  # pyright: ignore
    levels = bnb.get_4bit_type(quant_type, device="cpu")[codes.long()]
    scales = base.absmax.repeat_interleave(64)[:size]  # pyright: ignore
    assert torch.equal(base.dequantize(), (levels * scales).view(shape).to(dtype))


def test_int8_codes_equal_the_library(weight: torch.Tensor) -> None:
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
    base = Int8Base.from_weight(weight.half(), None, dtype=torch.float32)
    assert torch.equal(base.codes, codes)
    assert torch.equal(base.absmax, absmax)
    torch.testing.assert_close(base.dequantize(), bnb.int8_vectorwise_dequant(codes, absmax), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", [*FOUR_BIT, "int8"])
def test_quantizing_the_dequantized_weight_changes_nothing(
    storage: str, dtype: torch.dtype, weight: torch.Tensor
) -> None:
    # The largest weight of a block is its scale: it must be a number of that dtype.
    once = build_base(storage, weight.to(dtype), None, dtype=dtype)
    twice = build_base(storage, once.dequantize(), None, dtype=dtype)
    assert torch.equal(once.dequantize(), twice.dequantize())


def test_double_quantization_is_not_idempotent(weight: torch.Tensor) -> None:
    once = build_base("nf4", weight, None, dtype=torch.float32, double_quant=True)
    twice = build_base("nf4", once.dequantize(), None, dtype=torch.float32, double_quant=True)
    assert not torch.equal(once.dequantize(), twice.dequantize())


@pytest.mark.parametrize("double_quant", [False, True])
def test_changing_rows_leaves_the_others_bit_identical_only_without_double_quantization(
    double_quant: bool, weight: torch.Tensor
) -> None:
    before = build_base("nf4", weight, None, dtype=torch.float32, double_quant=double_quant).dequantize()
    changed = weight.clone()
    changed[:3] *= 2
    after = build_base("nf4", changed, None, dtype=torch.float32, double_quant=double_quant).dequantize()
    assert torch.equal(before[3:], after[3:]) is not double_quant


@pytest.mark.parametrize("storage", [*FOUR_BIT, "int8"])
def test_a_weight_of_zeros_stays_zero(storage: str) -> None:
    base = build_base(storage, torch.zeros(4, 128), None, dtype=torch.bfloat16)
    assert torch.equal(base.dequantize(), torch.zeros(4, 128, dtype=torch.bfloat16))


def test_storage_takes_the_bytes_it_promises(weight: torch.Tensor) -> None:
    def size(storage: str, *, double_quant: bool = False) -> float:
        base = build_base(storage, weight, None, dtype=torch.bfloat16, double_quant=double_quant)
        return sum(buffer.nbytes for buffer in base.buffers())

    num_blocks = weight.numel() / 64
    assert size("nf4") == weight.numel() / 2 + 4 * num_blocks
    # One byte per block, one fp32 per 256 blocks, the code book of 256 levels and the offset.
    assert size("nf4", double_quant=True) == weight.numel() / 2 + num_blocks + 4 * -(-num_blocks // 256) + 4 * 256 + 4
    assert size("int8") == weight.numel() + 4 * weight.shape[0]


@pytest.mark.parametrize("quant_type", FOUR_BIT)
@pytest.mark.parametrize("double_quant", [False, True])
def test_stored_four_bit_weights_are_read_in_full_precision(
    quant_type: str, double_quant: bool, weight: torch.Tensor
) -> None:
    packed, state = bnb.quantize_4bit(
        weight.bfloat16(), blocksize=64, quant_type=quant_type, compress_statistics=double_quant
    )
    stored = dequantize_stored({"weight": packed, **state.as_dict(packed=True)})
    assert stored.dtype == torch.float32
    assert torch.equal(stored.bfloat16(), bnb.dequantize_4bit(packed, state))


def test_stored_int8_weights_are_codes_times_scales(weight: torch.Tensor) -> None:
    base = Int8Base.from_weight(weight, None, dtype=torch.float32)
    stored = {"weight": base.codes, "SCB": base.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    assert torch.equal(dequantize_stored(stored), base.dequantize())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"SCB": torch.ones(4), "weight_format": torch.tensor(1)}, "tile order"),
        ({"absmax": torch.ones(2)}, "quant_map of a 4-bit weight is missing"),
    ],
)
def test_unreadable_stored_weights_are_refused(parts: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize_stored({"weight": torch.zeros(4, 4, dtype=torch.int8), **parts})


@pytest.mark.parametrize(
    ("storage", "options", "message"),
    [
        ("nf5", {}, "must be one of bf16, fp16, fp32, nf4, fp4, int8, int4, int8_group"),
        ("int4", {}, "needs grid_quantizer"),
        ("int8", {"double_quant": True}, "only nf4 and fp4"),
    ],
)
def test_impossible_storage_is_refused(storage: str, options: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_base(storage, torch.zeros(4, 64), None, dtype=torch.float32, **options)
