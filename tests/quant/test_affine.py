from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from qaft.quant import Affine, QTensor

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("symmetric", "group_size", "published"),
    [(True, 128, 13.8e-3), (True, 4096, 24.8e-3), (False, 128, 10.1e-3), (False, 4096, 19.5e-3)],
)
def test_the_error_of_gaussian_weights_is_the_published_one(symmetric: bool, group_size: int, published: float) -> None:
    weight = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(1))
    quantized = Affine(symmetric=symmetric, group_size=group_size)(weight)
    error = (quantized - weight).square().sum() / weight.square().sum()
    assert error.item() == pytest.approx(published, rel=0.02)


def test_ties_round_to_the_even_level() -> None:
    weight = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.4999998]])
    assert Affine(group_size=8).quantize(weight).values.tolist() == [[7, 0, 2, 2, 0, -2, -2, 3]]


def test_a_symmetric_scale_is_the_maximum_over_the_largest_code() -> None:
    weight = torch.tensor([[-7.0, 1.0, 2.0, 3.0, 14.0, 1.0, 2.0, 28.0]])
    assert Affine(group_size=4).quantize(weight).scale.tolist() == [[1.0, 4.0]]


def test_an_asymmetric_range_includes_zero() -> None:
    grid = Affine(group_size=4, symmetric=False)
    quantized = grid.quantize(torch.tensor([[15.0, 5.0, 6.0, 7.0, -15.0, -5.0, -6.0, -7.0, -5.0, 0.0, 3.0, 10.0]]))
    assert quantized.scale.tolist() == [[1.0, 1.0, 1.0]]
    assert quantized.zero_point is not None and quantized.zero_point.tolist() == [[-8, 7, -3]]
    assert quantized.values.tolist() == [[7, -3, -2, -1, -8, 2, 1, 0, -8, -3, 0, 7]]


def test_the_scale_is_rounded_before_the_codes_are_computed() -> None:
    # 7.1 / 7 is 1.01428 and becomes 1.015625 in bf16: 3.55 then is level 3.495, below the boundary it is above in fp32.
    weight = torch.tensor([[7.1, 3.55]])
    assert Affine(group_size=None).quantize(weight).values.tolist() == [[7, 4]]
    rounded = Affine(group_size=None, scale_dtype=torch.bfloat16).quantize(weight)
    assert rounded.values.tolist() == [[7, 3]] and rounded.scale.item() == 1.015625


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_fp32_scales_times_codes_are_exact_in_fp32(bits: int, symmetric: bool) -> None:
    quantized = Affine(bits=bits, symmetric=symmetric).quantize(torch.randn(64, 256))
    exact = quantized.dequantize(torch.float64)
    assert torch.equal(exact.float().double(), exact)
    levels = quantized.values.double().unflatten(1, (2, 128))
    if quantized.zero_point is not None:
        levels = levels - quantized.zero_point.double().unsqueeze(-1)
    assert torch.equal(exact, (levels * quantized.scale.double().unsqueeze(-1)).flatten(1))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_compressed_tensors_dequantizes_to_the_same_weight(symmetric: bool, scale_dtype: torch.dtype) -> None:
    quantized = Affine(group_size=32, symmetric=symmetric, scale_dtype=scale_dtype).quantize(torch.randn(8, 64))
    args = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=symmetric)
    theirs = dequantize(quantized.values, quantized.scale, quantized.zero_point, args)
    assert torch.equal(theirs, quantized.dequantize(scale_dtype))


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_too_small_for_fp16_become_its_smallest_normal_number(symmetric: bool) -> None:
    grid = Affine(group_size=None, symmetric=symmetric, scale_dtype=torch.float16)
    quantized = grid.quantize(torch.tensor([[1e-6, -2e-5, 0.0, 3e-4]]))
    assert quantized.scale.item() == torch.finfo(torch.float16).tiny
    assert quantized.dequantize(torch.float32).tolist() == [[0.0, 0.0, 0.0, 5 * torch.finfo(torch.float16).tiny]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_too_large_for_fp16_are_refused(symmetric: bool) -> None:
    weight = torch.tensor([[2e6, -2e6, 0.0, 1.0]])
    with pytest.raises(ValueError, match=r"exceeds the largest torch\.float16, 65504: store scales in"):
        Affine(group_size=None, symmetric=symmetric, scale_dtype=torch.float16).quantize(weight)
    assert torch.isfinite(Affine(group_size=None, symmetric=symmetric).quantize(weight).scale).all()


@pytest.mark.parametrize(
    ("in_features", "group_size", "fitting"),
    [
        (576, 128, "use 8, 9, 12, 16, 18, 24, 32, 36, 48, 64, 72, 96, 144"),
        (577, 64, "use 577 or null"),
        (4, 8, "use null"),
    ],
)
def test_a_group_size_that_does_not_divide_names_those_that_do(in_features: int, group_size: int, fitting: str) -> None:
    with pytest.raises(
        ValueError, match=f"in_features={in_features} is not divisible by group_size={group_size}: {fitting}"
    ):
        Affine(group_size=group_size)(torch.randn(2, in_features))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, r"bits=1 must be in \[2, 8\]"),
        ({"bits": 9}, r"bits=9 must be in \[2, 8\]"),
        ({"group_size": 0}, "group_size=0 must be positive, or null or -1"),
        ({"group_size": -2}, "group_size=-2 must be positive, or null or -1"),
        ({"scale_dtype": torch.float64}, "scale_dtype=torch.float64 must be one of torch.float32"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Affine(**options)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 16), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_finite_weight_quantizes_once_and_for_all(
    array: np.ndarray, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    weight = torch.from_numpy(array)
    grid = Affine(bits=bits, group_size=8, symmetric=symmetric, scale_dtype=scale_dtype)
    quantized = grid.quantize(weight)
    once = quantized.dequantize(torch.float32)
    assert torch.equal(grid(weight), once)
    assert torch.equal(grid(once), once)
    assert grid.quantize(grid.dither(quantized, torch.Generator().manual_seed(0))).equals(quantized)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dither_keeps_one_carrier_of_each_extreme_and_moves_the_others_inwards(symmetric: bool) -> None:
    weight = torch.tensor([[7.0, 7.0, -7.0, -7.0, 0.0, 1.0, -3.0, 7.0]] * 50)
    grid = Affine(group_size=8, symmetric=symmetric)
    quantized = grid.quantize(weight)
    level = quantized.dequantize(torch.float32)
    moved = grid.dither(quantized, torch.Generator().manual_seed(0)) - level
    at_high, at_low = level == level.max(), level == level.min()
    assert (moved[at_high] <= 0).all() and (moved[at_low] >= 0).all()
    exact = (moved == 0) & (at_high | at_low)
    assert exact.sum(1).tolist() == [1 if symmetric else 2] * 50


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dither_is_uniform_within_half_a_step(bits: int, symmetric: bool) -> None:
    grid = Affine(bits=bits, symmetric=symmetric)
    quantized = grid.quantize(torch.randn(64, 512, generator=torch.Generator().manual_seed(2)))
    latents = grid.dither(quantized, torch.Generator().manual_seed(0))
    steps = (latents - quantized.dequantize(torch.float32)) / quantized.scale.repeat_interleave(128, 1)
    inner = steps[(quantized.values > grid.q_min) & (quantized.values < grid.q_max)]
    assert inner.abs().max() < 0.5
    edges = torch.linspace(-0.499, 0.499, 6)[1:-1]
    shares = torch.bincount(torch.bucketize(inner, edges), minlength=5) / len(inner)
    assert torch.allclose(shares, torch.full((5,), 0.2), atol=0.012)


@pytest.mark.parametrize("symmetric", [True, False])
def test_small_updates_are_felt_by_dithered_latents_and_lost_on_the_grid(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(512, 512, generator=generator)
    delta = torch.randn(512, 8, generator=generator) @ torch.randn(8, 512, generator=generator)
    delta *= 0.05 * weight.norm() / delta.norm()
    grid = Affine(symmetric=symmetric)
    quantized = grid.quantize(weight)
    on_grid = quantized.dequantize(torch.float32)

    def projection(latents: torch.Tensor) -> float:
        realised = grid(latents + delta) - grid(latents)
        return ((realised * delta).sum() / delta.square().sum()).item()

    assert projection(grid.dither(quantized, generator)) >= 0.95
    assert projection(weight) >= 0.95
    assert abs(projection(on_grid)) <= 0.2


def test_codes_of_a_clipped_grid_are_refused_by_dither() -> None:
    clipped = QTensor(torch.tensor([[1, 2, -3, 0]], dtype=torch.int8), torch.tensor([[0.5]]))
    with pytest.raises(ValueError, match="no result of Affine\\(bits=4, group_size=None"):
        Affine(group_size=None).dither(clipped, torch.Generator())


def test_scales_of_another_dtype_are_refused_by_dither() -> None:
    quantized = Affine(group_size=8, scale_dtype=torch.bfloat16).quantize(torch.randn(2, 8))
    with pytest.raises(ValueError, match="no result of Affine"):
        Affine(group_size=8).dither(quantized, torch.Generator())


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_gpu_finds_the_same_codes(symmetric: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weight = torch.randn(64, 256)
    grid = Affine(symmetric=symmetric)
    quantized, expected = grid.quantize(weight.cuda()), grid.quantize(weight)
    assert torch.equal(quantized.values.cpu(), expected.values)
    assert torch.equal(quantized.scale.cpu(), expected.scale)
    assert torch.equal(grid(weight.cuda()).cpu(), grid(weight))
