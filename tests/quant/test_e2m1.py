"""MXFP4 and NVFP4 against a slow reference, torch's float8 types and the formulas of compressed-tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from reference.e2m1 import LEVELS, mx_exponent, nearest, nv_tensor_exponent

from qaft.quant.e2m1 import MXFP4, NVFP4, round_e2m1

FP4 = pytest.mark.parametrize("grid", [MXFP4(), NVFP4()], ids=["mxfp4", "nvfp4"])


def boundary_values() -> torch.Tensor:
    """The middles between neighbouring levels, their neighbours in fp32, the levels and what lies beyond."""
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(LEVELS)])
    infinity = torch.tensor(float("inf"))
    near = torch.cat([middles, torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)])
    positive = torch.cat([near, torch.tensor(LEVELS), torch.tensor([5.5, 6.5, 7.0, 100.0])])
    return torch.cat([positive, -positive])


def weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 128, generator=generator) * torch.logspace(-6, 3, 16).unsqueeze(1)
    weight[3, :64] = 0.0
    weight[5] = weight[5].abs()
    return weight


def test_rounding_is_that_of_the_slow_reference_and_of_compressed_tensors_at_every_boundary() -> None:
    values = boundary_values()
    assert round_e2m1(values).tolist() == [nearest(v) for v in values.tolist()]
    assert torch.equal(round_e2m1(values), cast_to_fp4(values.clone()))


def test_mx_scales_are_the_e8m0_numbers_of_compressed_tensors() -> None:
    exact = torch.tensor([3.5, 7.0, 4.0, 1.75, 1.7499999, 6.0, 1.0, 3.4999998])
    weight = torch.cat([weights(), torch.stack([exact, -exact]).repeat(1, 16)])
    absmax = weight.unflatten(1, (4, 32)).abs().amax(-1)
    quantized = MXFP4().quantize(weight)
    assert quantized.scale.dtype == torch.float8_e8m0fnu
    expected = generate_mx_scales(absmax[absmax > 0]).to(torch.uint8)
    assert torch.equal(quantized.scale.view(torch.uint8)[absmax > 0], expected)
    assert quantized.scale.float().flatten().tolist() == [2.0 ** mx_exponent(a) for a in absmax.flatten().tolist()]


def test_mxfp4_codes_are_the_nearest_of_the_slow_reference() -> None:
    weight = weights()
    quantized = MXFP4().quantize(weight)
    scale = quantized.scale.float().repeat_interleave(32, dim=1)
    expected = [nearest(w / s) * s for w, s in zip(weight.flatten().tolist(), scale.flatten().tolist(), strict=True)]
    assert quantized.dequantize(torch.float64).flatten().tolist() == expected


def test_nvfp4_codes_and_scales_are_those_of_compressed_tensors_for_the_same_tensor_scale() -> None:
    weight = weights()
    quantized = NVFP4().quantize(weight)
    assert quantized.tensor_scale is not None and quantized.scale.dtype == torch.float8_e4m3fn
    tensor_scale = quantized.tensor_scale
    assert tensor_scale.item() == 2.0 ** nv_tensor_exponent(weight.abs().max().item())
    ratio = weight.unflatten(1, (8, 16)).abs().amax(-1) / (6 * tensor_scale)
    expected_scale = ratio.clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
    assert torch.equal(quantized.scale.view(torch.uint8), expected_scale.view(torch.uint8))
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    options = {"scale": quantized.scale.float(), "args": args, "global_scale": 1 / tensor_scale}
    codes = quantize(weight, zero_point=None, **options)
    assert torch.equal(dequantize(codes, dtype=torch.float32, **options), quantized.dequantize(torch.float32))


@pytest.mark.parametrize("absmax", [1392.0, 1392.0001, 2784.0, 2688.0, 1344.0, 1440.0, 3.0])
def test_the_tensor_scale_puts_the_largest_block_scale_at_the_top_of_e4m3_and_is_found_again(absmax: float) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * 1e-3 * absmax
    weight[1, 7] = -absmax
    quantized = NVFP4().quantize(weight)
    assert 240 <= quantized.scale.float().max() <= 448
    again = NVFP4().quantize(quantized.dequantize(torch.float32))
    assert again.equals(quantized)


def test_blocks_far_below_the_largest_keep_a_scale() -> None:
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 16:20], weight[0, 40] = 448 * 6.0, torch.tensor([6 * 2.0**-9, 0.004, 3e-3, 1e-3]), 1e-5
    quantized = NVFP4().quantize(weight)
    assert quantized.tensor_scale == 1 and quantized.scale.float().tolist() == [[448.0, 2.0**-9, 2.0**-9, 2.0**-9]]
    assert quantized.dequantize(torch.float32)[0, 16:20].tolist() == [6 * 2.0**-9, 2 * 2.0**-9, 1.5 * 2.0**-9, 2.0**-10]


@FP4
def test_a_negative_value_that_rounds_to_zero_has_the_code_of_zero(grid: MXFP4 | NVFP4) -> None:
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([6.0, -1e-3, -6.0])
    assert grid.quantize(weight).values[0, :3].tolist() == [7, 0, 15]


@pytest.mark.parametrize(("grid", "measured"), [(MXFP4(), 12.49e-3), (NVFP4(), 9.04e-3)], ids=["mxfp4", "nvfp4"])
def test_the_error_of_gaussian_weights_is_the_measured_one(grid: MXFP4 | NVFP4, measured: float) -> None:
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(1))
    error = (grid(weight) - weight).square().sum() / weight.square().sum()
    assert error.item() == pytest.approx(measured, rel=0.01)


@FP4
def test_clamp_and_trust_stop_the_gradient_where_they_say(grid: MXFP4 | NVFP4) -> None:
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([6.0, -6.0, 5.0, 6.2, 6.9, -6.1])
    expected = {"identity": [1.0] * 6}
    scaled = weight[0, :6] / (grid.quantize(weight).scale.float()[0, 0] * (grid.quantize(weight).tensor_scale or 1.0))
    expected["clamp"] = (scaled.abs() <= 6).float().tolist()
    expected["trust"] = (scaled.abs() <= 7).float().tolist()
    for ste, passes in expected.items():
        latent = weight.clone().requires_grad_()
        type(grid)(ste=ste)(latent).sum().backward()
        assert latent.grad is not None and latent.grad[0, :6].tolist() == passes


@FP4
def test_a_width_that_does_not_divide_is_refused(grid: MXFP4 | NVFP4) -> None:
    with pytest.raises(ValueError, match=f"in_features=40 is not divisible by {grid.group_size}, the block size"):
        grid(torch.randn(2, 40))


def test_an_unknown_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="ste='none' must be one of identity, clamp, trust"):
        MXFP4(ste="none")


@FP4
def test_codes_of_another_grid_are_refused_by_dither(grid: MXFP4 | NVFP4) -> None:
    quantized = grid.quantize(torch.randn(2, 64))
    quantized.values.fill_(1)
    with pytest.raises(ValueError, match=f"no result of {type(grid).__name__}"):
        grid.dither(quantized, torch.Generator())
