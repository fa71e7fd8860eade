"""Q4_0 against gguf's own quantizer, bit for bit."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize

from qaft.quant import QTensor
from qaft.quant.q4_0 import Q4_0

TYPE = gguf.GGMLQuantizationType.Q4_0


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(32, 256, generator=generator) * torch.logspace(-6, 3, 32).unsqueeze(1)
    zeros = gaussian.clone()
    zeros[3], zeros[4, :32] = 0.0, 0.0
    ties = torch.randint(-16, 17, (32, 256), generator=generator) / 2
    boundary = torch.full((8, 32), 8.0) * torch.tensor([1, 3, 0.7, 1e-3, 123.456, 2.0**-14, -1, -3]).unsqueeze(1)
    steps = (torch.arange(31) - 15) / 2
    boundary[:, 1:] *= torch.nextafter(steps, steps + 1) / 8
    return {"gaussian": gaussian, "zeros": zeros, "ties": ties, "boundary": boundary, "bf16": gaussian.bfloat16()}


def packed(quantized: QTensor) -> torch.Tensor:
    """The block layout of GGUF: fp16 scale, then 16 bytes that hold codes i and i + 16 of the block."""
    nibbles = (quantized.values + 8).to(torch.uint8).unflatten(1, (-1, 2, 16))
    codes = nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)
    scale = quantized.scale.view(torch.uint8).unflatten(1, (-1, 2))
    return torch.cat([scale, codes], dim=-1).flatten(1)


@pytest.mark.parametrize("name", weights())
def test_codes_and_scales_are_the_bytes_that_gguf_writes(name: str) -> None:
    weight = weights()[name]
    theirs = quantize(weight.float().numpy(), TYPE)
    assert torch.equal(packed(Q4_0().quantize(weight)), torch.from_numpy(theirs))
    assert torch.equal(Q4_0()(weight), torch.from_numpy(dequantize(theirs, TYPE)))


def test_the_largest_weight_is_level_minus_eight_and_its_opposite_is_clipped() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([4.0, -4.0, 3.75, -3.75])
    quantized = Q4_0().quantize(weight)
    assert quantized.scale.item() == -0.5 and quantized.values[0, :4].tolist() == [-8, 7, -7, 7]


def test_the_error_of_gaussian_weights_is_that_of_signed_absmax_in_groups_of_32() -> None:
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(1))
    error = (Q4_0()(weight) - weight).square().sum() / weight.square().sum()
    assert error.item() == pytest.approx(7.38e-3, rel=0.01)


@pytest.mark.parametrize(
    ("ste", "passes"), [("identity", [1, 1, 1, 1]), ("clamp", [1, 0, 0, 1]), ("trust", [1, 0, 1, 1])]
)
def test_clamp_and_trust_stop_the_gradient_beyond_level_seven(ste: str, passes: list[int]) -> None:
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([4.0, -4.0, -3.7, -3.5])
    latent = weight.requires_grad_()
    Q4_0(ste=ste)(latent).sum().backward()
    assert latent.grad is not None and latent.grad[0, :4].tolist() == passes


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="in_features=40 is not divisible by 32, the block size of q4_0"):
        Q4_0()(torch.randn(2, 40))


def test_a_scale_beyond_fp16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exceeds the largest torch\.float16, 65504, which q4_0 stores"):
        Q4_0().quantize(torch.full((1, 32), 1e6))


def test_a_block_without_its_maximum_is_refused_by_dither() -> None:
    quantized = QTensor(torch.full((1, 32), 3, dtype=torch.int8), torch.ones(1, 1, dtype=torch.float16))
    with pytest.raises(ValueError, match="no result of Q4_0"):
        Q4_0().dither(quantized, torch.Generator())
