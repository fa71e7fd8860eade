"""Q8_0 against gguf's own quantizer, bit for bit."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize

from qaft.quant import QTensor
from qaft.quant.q8_0 import Q8_0

TYPE = gguf.GGMLQuantizationType.Q8_0


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(32, 256, generator=generator) * torch.logspace(-6, 3, 32).unsqueeze(1)
    zeros = gaussian.clone()
    zeros[3], zeros[4, :32] = 0.0, 0.0
    ties = torch.randint(-254, 255, (32, 256), generator=generator) / 2
    ties[:, ::32] = 127.0
    boundary = ties.clone()
    boundary[:, 1::2] = torch.nextafter(boundary[:, 1::2], torch.zeros(()))
    return {"gaussian": gaussian, "zeros": zeros, "ties": ties, "boundary": boundary, "bf16": gaussian.bfloat16()}


@pytest.mark.parametrize("name", weights())
def test_codes_and_scales_are_the_bytes_that_gguf_writes(name: str) -> None:
    weight = weights()[name]
    theirs = quantize(weight.float().numpy(), TYPE)
    quantized = Q8_0().quantize(weight)
    scale = quantized.scale.view(torch.uint8).unflatten(1, (-1, 2))
    codes = quantized.values.view(torch.uint8).unflatten(1, (-1, 32))
    assert torch.equal(torch.cat([scale, codes], dim=-1).flatten(1), torch.from_numpy(theirs))
    assert torch.equal(Q8_0()(weight), torch.from_numpy(dequantize(theirs, TYPE)))


def test_halves_are_rounded_away_from_zero_and_what_is_just_below_is_not() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :5] = torch.tensor([127.0, 0.5, -2.5, 0.49999997, -0.49999997])
    assert Q8_0().quantize(weight).values[0, :5].tolist() == [127, 1, -3, 0, 0]


def test_the_error_of_gaussian_weights_is_that_of_255_levels_in_groups_of_32() -> None:
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(1))
    blocks = weight.unflatten(1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    error = (Q8_0()(weight) - weight).square().mean()
    # The largest weight of each block is exact.
    assert error.item() == pytest.approx(31 / 32 * (step.square() / 12).mean().item(), rel=0.01)


@pytest.mark.parametrize("ste", ["identity", "clamp", "trust"])
def test_the_gradient_passes_everywhere_because_nothing_is_clipped(ste: str) -> None:
    latent = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    Q8_0(ste=ste)(latent).sum().backward()
    assert latent.grad is not None and torch.equal(latent.grad, torch.ones(4, 64))


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="in_features=40 is not divisible by 32, the block size of q8_0"):
        Q8_0()(torch.randn(2, 40))


def test_a_block_without_its_maximum_is_refused_by_dither() -> None:
    quantized = QTensor(torch.full((1, 32), 3, dtype=torch.int8), torch.ones(1, 1, dtype=torch.float16))
    with pytest.raises(ValueError, match="no result of Q8_0"):
        Q8_0().dither(quantized, torch.Generator())
