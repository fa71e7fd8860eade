"""Activations: integers per token, as servers run them and as RoSTE trained them."""

from __future__ import annotations

import struct

import pytest
import torch

from qaft.quant.activation import TokenQuantizer


def to_fp32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def token_reference(values: list[float], bits: int, symmetric: bool, clip: float) -> list[float]:
    """Quantize one token in Python floats, every fp32 rounding written out."""
    q_max = 2 ** (bits - 1) - 1
    if symmetric:
        largest = to_fp32(to_fp32(clip) * max(abs(v) for v in values)) if clip < 1 else max(abs(v) for v in values)
        scale, low, high = to_fp32(largest / q_max), -q_max, q_max
    else:
        bottom, top = min(0.0, *values), max(0.0, *values)
        span = to_fp32(clip * to_fp32(top - bottom))
        scale = to_fp32(span / (2**bits - 1))
        low = round(to_fp32(to_fp32(clip * bottom) / scale))
        high = low + 2**bits - 1
    inverse = to_fp32(1 / scale)
    return [to_fp32(min(high, max(low, round(to_fp32(v * inverse)))) * scale) for v in values]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_the_integers_of_the_forward(bits: int, symmetric: bool, generator: torch.Generator) -> None:
    x = torch.randn(5, 64, generator=generator)
    quantizer = TokenQuantizer(bits=bits, symmetric=symmetric)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = x.abs().amax(-1, keepdim=True) / quantizer.q_max if symmetric else (high - low) / (2**bits - 1)
    torch.testing.assert_close(quantizer.codes(x) * scale, quantizer(x))
    spans = quantizer.codes(x).amax(-1) - quantizer.codes(x).amin(-1)
    assert int(spans.max()) <= (2 * quantizer.q_max if symmetric else 2**bits - 1)


@pytest.mark.parametrize("clip", [1.0, 0.5])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_token_equals_the_slow_reference(bits: int, symmetric: bool, clip: float) -> None:
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 40.0]).view(3, 1)
    x[0, 1] = x[0, 1].abs()
    quantized = TokenQuantizer(bits=bits, symmetric=symmetric, clip=clip)(x)
    for token, expected in zip(quantized.flatten(0, 1), x.flatten(0, 1), strict=True):
        assert token.tolist() == token_reference(expected.tolist(), bits, symmetric, clip)


def test_symmetric_eight_bits_are_the_int8_of_a_server() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    absmax = x.abs().amax(-1, keepdim=True)
    codes = (x * (1 / (absmax / 127))).round().to(torch.int8)
    assert torch.equal(TokenQuantizer(bits=8)(x), codes.float() * (absmax / 127))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_computed_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    quantizer = TokenQuantizer(bits=4)
    assert quantizer(x).dtype == dtype
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))


@pytest.mark.parametrize(
    ("bits", "symmetric", "clip", "expected"),
    [(4, True, 1.0, 23.3e-3), (4, False, 1.0, 18.0e-3), (4, False, 0.95, 16.3e-3), (8, True, 1.0, 7.1e-5)],
)
def test_the_error_of_gaussian_tokens_of_two_thousand_channels_is_the_measured_one(
    bits: int, symmetric: bool, clip: float, expected: float
) -> None:
    x = torch.randn(512, 2048, generator=torch.Generator().manual_seed(1))
    error = (TokenQuantizer(bits=bits, symmetric=symmetric, clip=clip)(x) - x).square().sum() / x.square().sum()
    assert error.item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_and_constant_tokens_have_a_scale(symmetric: bool) -> None:
    x = torch.stack([torch.zeros(8), torch.full((8,), 3.0), torch.full((8,), -0.1)])
    quantized = TokenQuantizer(bits=4, symmetric=symmetric)(x)
    assert quantized[0].tolist() == [0.0] * 8
    torch.testing.assert_close(quantized, x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_poisons_its_token_alone(value: float, symmetric: bool) -> None:
    x = torch.randn(2, 8)
    x[0, 3] = value
    quantized = TokenQuantizer(symmetric=symmetric)(x)
    assert torch.isnan(quantized[0]).any() and torch.isfinite(quantized[1]).all()


@pytest.mark.parametrize(
    ("ste", "passes"), [("identity", [1, 1, 1, 1]), ("clamp", [0, 0, 1, 1]), ("trust", [0, 1, 1, 1])]
)
def test_masks_act_on_what_the_clip_cuts_off(ste: str, passes: list[int]) -> None:
    # q_max = 7 and clip 1/2: s = 1, so that 7.4 is 0.4 steps beyond the range and 14 far outside.
    x = torch.tensor([[14.0, -7.4, 7.0, 0.3]], requires_grad=True)
    TokenQuantizer(bits=4, clip=0.5, ste=ste)(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [passes]


@pytest.mark.parametrize("ste", ["identity", "clamp", "trust"])
def test_without_a_clip_every_gradient_passes_and_nothing_is_kept(ste: str) -> None:
    kept: list[torch.Tensor] = []
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        TokenQuantizer(symmetric=False, ste=ste)(x).sum().backward()
    assert kept == [] and x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, r"bits=1 must be in \[2, 8\]"),
        ({"clip": 0.0}, r"clip=0.0 must be in \(0, 1\]"),
        ({"ste": "none"}, "ste='none' must be one of"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenQuantizer(**options)


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_vectors_without_values_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the last axis must hold at least one value"):
        TokenQuantizer()(torch.zeros(shape))


def test_no_tokens_give_no_tokens() -> None:
    assert TokenQuantizer()(torch.zeros(0, 8)).shape == (0, 8)
