from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from qaft.quant import NF4, QTensor
from qaft.quant.nf4 import _codebook, _num_below

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed(quantized: QTensor) -> torch.Tensor:
    """Two indices per byte, the first in the high nibble: the storage of bitsandbytes."""
    indices = quantized.values.to(torch.uint8).view(-1, 2)
    return ((indices[:, :1] << 4) | indices[:, 1:]).contiguous()


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(16, 256, generator=generator) * torch.logspace(-4, 2, 16).unsqueeze(1)
    gaussian[3] = 0.0
    gaussian[4, :64] = 0.0
    gaussian[5] = gaussian[5].abs()
    return [gaussian, gaussian.sign(), (gaussian * 8).round() / 8]


def boundary_weights() -> torch.Tensor:
    """Blocks whose values are the decision boundaries and their neighbours in fp32, for maxima of 1 and others."""
    _, bounds = _codebook(torch.device("cpu"))
    infinity = torch.tensor(float("inf"))
    near = torch.cat([bounds, torch.nextafter(bounds, infinity), torch.nextafter(bounds, -infinity)])
    block = torch.cat([torch.tensor([1.0]), near, torch.zeros(64 - 1 - len(near))])
    return block * torch.tensor([1.0, 3.0, 0.7, 1e-3, 123.456, 2.0**-40]).unsqueeze(1)


def test_the_levels_are_those_of_bitsandbytes() -> None:
    levels, _ = _codebook(torch.device("cpu"))
    assert torch.equal(levels, bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_are_bit_equal_to_bitsandbytes(dtype: torch.dtype, group_size: int) -> None:
    for weight in (*weights(), boundary_weights().repeat(1, 4)):
        weight = weight.to(dtype)
        theirs, state = bnb.quantize_4bit(weight, blocksize=group_size, compress_statistics=False, quant_type="nf4")
        quantized = NF4(group_size=group_size).quantize(weight)
        assert torch.equal(packed(quantized), theirs)
        assert torch.equal(quantized.scale.flatten(), state.absmax)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_weights_are_bit_equal_to_bitsandbytes(dtype: torch.dtype) -> None:
    for weight in weights():
        theirs, state = bnb.quantize_4bit(weight.to(dtype), blocksize=64, compress_statistics=False, quant_type="nf4")
        assert torch.equal(NF4().quantize(weight.to(dtype)).dequantize(dtype), bnb.dequantize_4bit(theirs, state))


def test_counting_boundaries_equals_a_binary_search() -> None:
    _, bounds = _codebook(torch.device("cpu"))
    x = torch.cat([boundary_weights().flatten(), torch.linspace(-1.1, 1.1, 1001)])
    assert torch.equal(_num_below(x, bounds), torch.bucketize(x, bounds))


@pytest.mark.parametrize(
    ("group_size", "published", "rows"), [(64, 8.5e-3, 64), (128, 9.1e-3, 64), (4096, 12.1e-3, 256)]
)
def test_the_error_of_gaussian_weights_is_the_published_one(group_size: int, published: float, rows: int) -> None:
    weight = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(1))
    error = (NF4(group_size=group_size)(weight) - weight).square().sum() / weight.square().sum()
    assert error.item() == pytest.approx(published, rel=0.02)


def test_dither_fills_the_decision_cells_and_keeps_the_maximum() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(4))
    grid = NF4()
    quantized = grid.quantize(weight)
    latents = grid.dither(quantized, torch.Generator().manual_seed(0))
    relative = latents.view(-1, 64) / quantized.scale.view(-1, 1)
    assert (relative.abs() == 1).sum(1).tolist() == [1] * len(relative)
    _, bounds = _codebook(torch.device("cpu"))
    for code in range(1, 15):
        inside = relative[quantized.values.view(-1, 64) == code]
        position = (inside - bounds[code - 1]) / (bounds[code] - bounds[code - 1])
        assert 0 < position.min() and position.max() < 1
        assert position.mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(grid(latents), quantized.dequantize(torch.float32))


def test_small_updates_are_felt_by_dithered_latents_and_lost_on_the_grid() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(512, 512, generator=generator)
    delta = torch.randn(512, 8, generator=generator) @ torch.randn(8, 512, generator=generator)
    delta *= 0.02 * weight.norm() / delta.norm()
    grid = NF4()
    quantized = grid.quantize(weight)

    def projection(latents: torch.Tensor) -> float:
        realised = grid(latents + delta) - grid(latents)
        return ((realised * delta).sum() / delta.square().sum()).item()

    assert projection(grid.dither(quantized, generator)) == pytest.approx(1.0, abs=0.05)
    assert abs(projection(quantized.dequantize(torch.float32))) <= 0.1


@pytest.mark.parametrize(
    ("in_features", "advice"), [(96, "use 32"), (576 + 32, "use 32"), (577, "no nf4 block size fits, use an int grid")]
)
def test_blocks_that_would_cross_rows_are_refused(in_features: int, advice: str) -> None:
    with pytest.raises(ValueError, match=f"in_features={in_features} is not divisible by group_size=64: {advice}"):
        NF4().quantize(torch.randn(2, in_features))


def test_a_block_without_its_maximum_is_refused_by_dither() -> None:
    quantized = QTensor(torch.full((1, 64), 9, dtype=torch.int8), torch.ones(1, 1))
    with pytest.raises(ValueError, match="no result of NF4"):
        NF4().dither(quantized, torch.Generator())
