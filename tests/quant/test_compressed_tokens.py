"""Inputs as compressed-tensors rounds them: bit for bit the library's own function."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from qaft.quant.activation import TokenQuantizer
from qaft.quant.compressed_tokens import CompressedTensorsTokens


def tokens(dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(2, 9, 512, generator=generator) * torch.logspace(-3, 3, 9).unsqueeze(-1)
    x[0, 0] = 0
    x[1, 1, :4] = torch.tensor([9e3, -9e3, 1.0, 0.0])
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_values_and_codes_are_those_of_the_library(bits: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = tokens(dtype, generator)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="token", dynamic=True)
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    quantizer = CompressedTensorsTokens(bits=bits)
    assert torch.equal(quantizer(x), fake_quantize(x, scale, zero_point, args))
    assert torch.equal(quantizer.codes(x).to(dtype), quantize(x, scale, zero_point, args))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tenth_of_the_codes_of_a_gaussian_token_are_others_than_those_of_kernels(
    bits: int, generator: torch.Generator
) -> None:
    x = torch.randn(64, 4096, generator=generator)
    ours, theirs = TokenQuantizer(bits=bits).codes(x), CompressedTensorsTokens(bits=bits).codes(x)
    assert 0.08 < float((ours != theirs).float().mean()) < 0.12
    assert int(ours.min()) == -(2 ** (bits - 1)) + 1 and int(theirs.min()) == -(2 ** (bits - 1))


def test_the_gradient_passes_everywhere(generator: torch.Generator) -> None:
    x = torch.randn(3, 16, generator=generator, requires_grad=True)
    weight = torch.randn(3, 16, generator=generator)
    (CompressedTensorsTokens(bits=4)(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)  # pyright: ignore[reportArgumentType]
