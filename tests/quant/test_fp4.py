"""FP4: two codes of zero, and which weights have them."""

from __future__ import annotations

import torch

from qaft.quant import FP4


def codes_of(*values: float) -> list[int]:
    """Return the codes of ``values`` in a block whose maximum is 1."""
    return (
        FP4()
        .quantize(torch.tensor([[1.0, *values] + [0.0] * (63 - len(values))]))
        .values[0, 1 : len(values) + 1]
        .tolist()
    )


def test_a_code_is_a_sign_two_bits_of_exponent_and_one_of_mantissa() -> None:
    levels = [-1.0 if code & 8 else 1.0 for code in range(16)]
    for code in range(16):
        # Read as a float with exponents from 2^1 = 12 / 6, as 0b00 is that of 8 and 12: (2, 3), (4, 6), (8, 12).
        exponent = {0b11: 1, 0b10: 2, 0b01: 3}.get(code >> 1 & 3)
        size = (code & 1) / 16 if exponent is None else 2**exponent * (1 + (code & 1) / 2)
        levels[code] *= size / 12
    assert list(FP4.levels) == levels


def test_numbers_up_to_zero_have_the_code_of_zero_and_small_positive_ones_that_of_minus_zero() -> None:
    assert codes_of(0.0, -0.0, -1e-30, -1 / 400) == [0, 0, 0, 0]
    assert codes_of(1e-30, 1 / 400) == [8, 8]
    assert codes_of(1 / 380, -1 / 380) == [1, 9]


def test_a_zero_of_either_code_is_requantized_to_the_first() -> None:
    quantized = FP4().quantize(torch.tensor([[1.0, 1e-30, -1e-30, *[0.5] * 61]]))
    again = FP4().quantize(quantized.dequantize(torch.float32))
    assert quantized.values[0, :3].tolist() == [3, 8, 0] and again.values[0, :3].tolist() == [3, 0, 0]
    assert torch.equal(again.dequantize(torch.float32), quantized.dequantize(torch.float32))


def test_zero_is_positive_in_every_weight() -> None:
    weight = torch.tensor([[1.0, 1e-30, -1e-30, -0.0, *[0.5] * 60], [-0.0] * 64])
    for dequantized in (FP4()(weight), FP4().quantize(weight).dequantize(torch.bfloat16)):
        assert not torch.signbit(dequantized).any()


def test_latents_of_the_two_zeros_lie_on_their_sides_of_zero() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    quantized = FP4().quantize(weight)
    latents = FP4().dither(quantized, torch.Generator().manual_seed(1))
    assert (latents[quantized.values == 0] < 0).all() and (latents[quantized.values == 8] > 0).all()
