"""What is written is what the library would have written, and what its layers hold is read back."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from qaft.bases.bnb import FourBitBase, Int8Base, dequantize_stored
from qaft.bases.bnb_layout import four_bit_tensors, frozen_four_bit_tensors, held_by, int8_tensors
from qaft.quant import CODE_BOOKS


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return torch.randn(32, 256, generator=generator)


def library_tensors(weight: Tensor, *, block_size: int = 64, quant_type: str = "nf4", nested: bool = False) -> Any:
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=quant_type, compress_statistics=nested
    )
    return {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("kind", CODE_BOOKS)
def test_trained_codes_are_stored_as_the_library_stores_its_own(weight: Tensor, kind: str, block_size: int) -> None:
    codes = CODE_BOOKS[kind](group_size=block_size).quantize(weight)
    ours = four_bit_tensors(codes, dtype=torch.float32, quant_type=kind)
    assert_same(ours, library_tensors(weight, block_size=block_size, quant_type=kind))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_frozen_bytes_are_stored_as_the_library_stores_its_own(weight: Tensor, quant_type: Any, nested: bool) -> None:
    base = FourBitBase.from_weight(weight, None, dtype=torch.float32, quant_type=quant_type, double_quant=nested)
    assert_same(frozen_four_bit_tensors(base), library_tensors(weight, quant_type=quant_type, nested=nested))


@pytest.mark.parametrize("block_size", [64, 128, 2048])
def test_blocks_of_other_sizes_are_read_wherever_rows_end(generator: torch.Generator, block_size: int) -> None:
    weight = torch.randn(64, 96, generator=generator)
    stored = library_tensors(weight, block_size=block_size)
    parts = {name.removeprefix("weight.") if name != "weight" else name: t for name, t in stored.items()}
    packed = stored["weight"].flatten()
    levels = bnb.functional.get_4bit_type("nf4", device="cpu")[torch.stack([packed >> 4, packed & 15], -1).long()]
    expected = levels.flatten() * stored["weight.absmax"].repeat_interleave(block_size)[: weight.numel()]
    assert torch.equal(dequantize_stored(parts).flatten(), expected)


def test_a_loaded_4_bit_layer_holds_the_stored_weight(weight: Tensor) -> None:
    stored = library_tensors(weight)
    layer = bnb.nn.Linear4bit(256, 32, bias=True, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        stored.pop("weight"), {k.removeprefix("weight."): v for k, v in stored.items()}, device="cpu", module=layer
    )
    held = held_by(layer)
    assert torch.equal(held.dequantize(), FourBitBase.from_weight(weight, None, dtype=torch.float32).dequantize())
    assert held.bias is not None and torch.equal(held.bias, layer.bias)


def test_a_loaded_int8_layer_holds_codes_times_maxima_unrounded(weight: Tensor) -> None:
    base = Int8Base.from_weight(weight, None, dtype=torch.bfloat16)
    stored = int8_tensors(base.codes, base.absmax)
    assert stored["weight_format"].dtype == torch.uint8 and int(stored["weight_format"]) == 0
    layer = bnb.nn.Linear8bitLt(256, 32, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(
        stored["weight"], requires_grad=False, CB=stored["weight"], SCB=stored["SCB"], has_fp16_weights=False
    )
    assert torch.equal(held_by(layer).dequantize(), base.codes.float() / 127 * base.absmax.unsqueeze(1))
