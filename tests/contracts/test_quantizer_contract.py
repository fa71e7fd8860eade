"""The laws of every registered weight grid: Q1 (idempotence), Q2 (half a step), Q3 (gradient), and exact dither."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from reference.affine_grid import linear_gradient, quantize_group
from torch import Tensor, nn

import qaft.quant.base as quant_base
from qaft.quant import CODE_BOOKS, FP4, MXFP4, NF4, NVFP4, Q4_0, Q8_0, QUANTIZERS, Affine, CodeBook, QTensor, Quantizer

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

AFFINE = [
    Affine(bits=bits, symmetric=symmetric, group_size=group_size, scale_dtype=scale_dtype)
    for bits, symmetric, group_size, scale_dtype in itertools.product(
        range(2, 9), (True, False), (None, 32, 64, 128), SCALE_DTYPES
    )
]
CLIPPED = [
    Affine(bits=bits, symmetric=symmetric, group_size=group_size, ste=ste, scale_dtype=scale_dtype, **options)
    for bits, group_size, ste, scale_dtype, (symmetric, options) in itertools.product(
        (2, 4, 8),
        (None, 32),
        ("clamp", "trust"),
        (torch.float32, torch.bfloat16),
        (
            (True, {"range": "signed_absmax"}),
            (True, {"range": "rms"}),
            (True, {"range": "mse"}),
            (False, {"range": "mse"}),
            (True, {"clip": 0.8}),
            (False, {"clip": 0.95}),
        ),
    )
    if (ste == "clamp") == (scale_dtype is torch.bfloat16)
]
BLOCKS = [kind(ste=ste) for kind in (Q4_0, Q8_0, MXFP4, NVFP4) for ste in ("identity", "clamp", "trust")]
BOOKS = [book(group_size=size) for book in CODE_BOOKS.values() for size in (64, 128)]
GRIDS: list[Quantizer] = [*AFFINE, *CLIPPED, *BLOCKS, *BOOKS]
DITHERED = [grid for grid in GRIDS if grid.can_dither]

HALF_STEP = {Affine: 0.5, Q4_0: 0.5, Q8_0: 0.5, MXFP4: 1.0, NVFP4: 1.0}
"""Half of the widest distance of neighbouring levels, in units of the scale."""

SCALE_STEP = {torch.float32: 2.0**-15, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Largest relative distance of neighbouring scales."""


def grid_id(grid: Quantizer) -> str:
    return f"{type(grid).__name__}({grid.extra_repr()})"


def every_grid(grids: list) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("grid", grids, ids=grid_id)


def weights() -> Iterator[Tensor]:
    """Gaussian rows of several sizes, coarse bf16 values, values with many ties, and rows of one sign."""
    generator = torch.Generator().manual_seed(3)
    gaussian = torch.randn(6, 256, generator=generator) * torch.logspace(-3, 1, 6).unsqueeze(1)
    yield gaussian
    yield gaussian.bfloat16().float()
    yield (gaussian * 4).round() / 2
    yield torch.stack([gaussian[3].abs(), -gaussian[3].abs(), gaussian[3] + 3, gaussian[3] - 3])


def test_the_contract_covers_every_registered_grid() -> None:
    assert {type(grid) for grid in GRIDS} == set(QUANTIZERS.values())


def effective_scale(quantized: QTensor) -> Tensor:
    """Return what levels are multiplied by, fp64 [O, G, 1]; 1 for a block of zeros, whose scale is 0 in Q4_0."""
    scale = quantized.scale.double().unsqueeze(-1)
    scale = scale if quantized.tensor_scale is None else scale * quantized.tensor_scale.double()
    return scale.masked_fill(scale == 0, 1.0)


def outermost(grid: Quantizer, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return w / s and the lowest and highest level in units of s, fp64, of shapes [O, G, N] and [O, G, 1]."""
    quantized = grid.quantize(weight)
    scale = effective_scale(quantized)
    groups = weight.detach().double().unflatten(1, (scale.shape[1], -1))
    if isinstance(grid, (MXFP4, NVFP4)):
        low, high = torch.full_like(scale, -6), torch.full_like(scale, 6)
    else:
        assert isinstance(grid, (Affine, Q4_0))
        zero = 0 if quantized.zero_point is None else quantized.zero_point.double().unsqueeze(-1)
        q_min, q_max = (grid.q_min, grid.q_max) if isinstance(grid, Affine) else (-8, 7)
        low, high = torch.full_like(scale, q_min) - zero, torch.full_like(scale, q_max) - zero
    return groups / scale, low, high


def passing(grid: Quantizer, weight: Tensor) -> Tensor:
    """Return where the gradient passes, by the definition of the grid's mask, [O, I] of 0 and 1."""
    unclipped = isinstance(grid, (CodeBook, Q8_0)) or (isinstance(grid, Affine) and grid.range.follows_extremes)
    if unclipped or grid.ste == "identity":
        return torch.ones(weight.shape)
    scaled, low, high = outermost(grid, weight)
    if isinstance(grid, Q4_0) or (isinstance(grid, Affine) and grid.range.kind == "signed_absmax"):
        # Their lowest level is the extreme of the group: nothing lies below it but by the rounding of the scale.
        scaled = torch.maximum(scaled, low)
    if grid.ste == "clamp":
        return ((low <= scaled) & (scaled <= high)).flatten(1).float()
    quantized = grid.quantize(weight)
    levels = quantized.dequantize(torch.float64).view_as(scaled) / effective_scale(quantized)
    return ((scaled - levels).abs() <= HALF_STEP[type(grid)]).flatten(1).float()


@every_grid(GRIDS)
def test_q1_quantizing_a_grid_point_returns_it(grid: Quantizer) -> None:
    for weight in weights():
        once = grid.quantize(weight).dequantize(torch.float32)
        assert torch.equal(grid.quantize(once).dequantize(torch.float32), once)


@every_grid([*CLIPPED, *BLOCKS[:3]])
def test_q2_the_error_inside_a_clipped_range_is_at_most_half_a_step(grid: Affine | Q4_0) -> None:
    for weight in weights():
        scaled, low, high = outermost(grid, weight)
        quantized = grid.quantize(weight)
        levels = quantized.dequantize(torch.float64).view_as(scaled) / effective_scale(quantized)
        # Q4_0 computes codes with the scale before it is rounded to fp16, by 2^-11 of up to 8 levels.
        margin = 2**-16 if isinstance(grid, Affine) else 2**-8
        assert (levels - torch.clamp(scaled, low, high)).abs().max() <= 0.5 + margin


@every_grid(AFFINE)
def test_q2_the_error_is_at_most_half_a_step(grid: Affine) -> None:
    for weight in weights():
        quantized = grid.quantize(weight)
        groups = weight.unflatten(1, (quantized.scale.shape[1], -1)).double()
        scale = quantized.scale.double().unsqueeze(-1)
        error = (quantized.dequantize(torch.float64).view_as(groups) - groups).abs() / scale
        zero = 0 if quantized.zero_point is None else quantized.zero_point.double().unsqueeze(-1)
        inside = (groups >= (grid.q_min - zero) * scale) & (groups <= (grid.q_max - zero) * scale)
        # fp32 rounds w / s, at most 256, by 2^-17.
        assert error[inside].max() <= 0.5 + 2**-16
        beyond = 0.0 if grid.symmetric else (2**grid.bits - 1) * SCALE_STEP[grid.scale_dtype]
        assert error.max() <= 0.5 + beyond + 2**-16


@every_grid(BOOKS)
def test_q2_a_code_book_chooses_the_nearest_level(grid: CodeBook) -> None:
    for weight in weights():
        quantized = grid.quantize(weight)
        assert quantized.codebook is not None and grid.group_size is not None
        scale = quantized.scale.repeat_interleave(grid.group_size, dim=1).double()
        distances = (weight.double().unsqueeze(-1) - quantized.codebook.double() * scale.unsqueeze(-1)).abs()
        chosen = distances.gather(-1, quantized.values.long().unsqueeze(-1)).squeeze(-1)
        assert ((chosen - distances.amin(-1)) <= 1e-6 * scale).all()


@every_grid(GRIDS)
def test_q3_the_gradient_is_that_of_the_effective_weight(grid: Quantizer, generator: torch.Generator) -> None:
    weight = nn.Parameter(torch.randn(2, 128, generator=generator))
    x, target = torch.randn(2, 128, generator=generator), torch.randn(2, 2, generator=generator)
    ((x @ grid(weight).T - target) ** 2).sum().backward()
    expected = linear_gradient(x, grid.quantize(weight).dequantize(torch.float32), target) * passing(grid, weight)
    torch.testing.assert_close(weight.grad, expected.float(), rtol=1e-4, atol=1e-3)


@every_grid(GRIDS)
def test_the_forward_pass_computes_exactly_what_is_exported(grid: Quantizer) -> None:
    for weight in weights():
        assert torch.equal(grid(weight), grid.quantize(weight).dequantize(torch.float32))


@every_grid(GRIDS)
def test_the_forward_pass_keeps_at_most_one_mask_for_backward(grid: Quantizer) -> None:
    kept: list[Tensor] = []
    weight = nn.Parameter(torch.randn(2, 128))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        grid(weight).sum().backward()
    masked = grid in CLIPPED or (grid in BLOCKS and grid.ste != "identity")
    assert [(t.dtype, t.shape) for t in kept] == [(torch.bool, weight.shape)] * masked
    with torch.no_grad():
        assert torch.equal(grid(weight), grid.quantize(weight).dequantize(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_grid([Affine(), Affine(symmetric=False, scale_dtype=torch.bfloat16), NF4(), FP4(), *BLOCKS[::3]])
def test_latents_of_any_dtype_quantize_as_their_fp32_values(grid: Quantizer, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 128).to(dtype).requires_grad_()
    quantized = grid(weight)
    quantized.backward(torch.full_like(quantized, 0.5))
    assert quantized.dtype == torch.float32
    assert torch.equal(quantized, grid(weight.float()))
    assert grid.quantize(weight).equals(grid.quantize(weight.float()))
    assert weight.grad is not None and weight.grad.dtype == dtype
    assert torch.equal(weight.grad, torch.full_like(weight, 0.5))


@every_grid(GRIDS)
def test_codes_and_scales_have_the_storage_they_declare(grid: Quantizer) -> None:
    for weight in weights():
        quantized = grid.quantize(weight)
        groups = 1 if grid.group_size is None else weight.shape[1] // grid.group_size
        assert quantized.values.dtype == torch.int8 and quantized.values.shape == weight.shape
        assert quantized.scale.shape == (weight.shape[0], groups)
        if isinstance(grid, Affine):
            assert (quantized.scale > 0).all() or grid.range.kind == "signed_absmax"
            assert quantized.scale.dtype == grid.scale_dtype
            assert grid.q_min <= quantized.values.min() and quantized.values.max() <= grid.q_max
            assert (quantized.zero_point is None) == grid.symmetric


@every_grid(GRIDS)
def test_rows_quantize_independently_of_each_other_and_of_the_blocks(
    grid: Quantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for weight in weights():
        whole = grid.quantize(weight)
        monkeypatch.setattr(quant_base, "_BLOCK_WEIGHTS", 1)
        assert grid.quantize(weight).equals(whole)
        assert torch.equal(grid(weight), whole.dequantize(torch.float32))
        row = grid.quantize(weight[1:2])
        assert torch.equal(row.values, whole.values[1:2])
        assert torch.equal(row.dequantize(torch.float32), whole.dequantize(torch.float32)[1:2])
        # The tensor scale of NVFP4 is one for all rows; a power of two, it only moves the exponents of their scales.
        assert torch.equal(row.scale, whole.scale[1:2]) or isinstance(grid, NVFP4)
        monkeypatch.undo()


@every_grid([grid for grid in GRIDS if not grid.can_dither])
def test_a_range_that_is_fitted_anew_refuses_to_be_dithered(grid: Quantizer) -> None:
    with pytest.raises(ValueError, match="their scales would be fitted anew; use range absmax or signed_absmax"):
        grid.dither(grid.quantize(torch.randn(2, 128)), torch.Generator())


@every_grid(DITHERED)
def test_dithered_latents_have_exactly_the_same_codes_and_scales(grid: Quantizer) -> None:
    for weight in weights():
        quantized = grid.quantize(weight)
        for seed in range(4):
            latents = grid.dither(quantized, torch.Generator().manual_seed(seed))
            assert latents.dtype == torch.float32
            assert grid.quantize(latents).equals(quantized)
            moved = latents != quantized.dequantize(torch.float32)
            assert moved[weight.any(dim=1)].any(dim=1).all()


@every_grid([Affine(), Affine(bits=8, symmetric=False), NF4(), FP4()])
def test_dither_depends_on_its_generator_alone(grid: Quantizer) -> None:
    quantized = grid.quantize(torch.randn(4, 256))
    first, second, other = (grid.dither(quantized, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@every_grid(GRIDS)
def test_zeros_stay_zeros_and_do_not_become_nan(grid: Quantizer) -> None:
    weight = torch.randn(3, 256)
    weight[1] = 0.0
    weight[2, :128] = 0.0
    quantized = grid.quantize(weight)
    assert torch.isfinite(quantized.scale.float()).all()
    assert (quantized.dequantize(torch.float32)[1] == 0).all()
    assert (grid(weight)[2, :128] == 0).all()
    if grid.can_dither:
        assert grid.quantize(grid.dither(quantized, torch.Generator().manual_seed(0))).equals(quantized)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@every_grid([*AFFINE[::29], *CLIPPED[::7], *BLOCKS, NF4(), FP4()])
def test_a_value_that_is_not_finite_is_refused_and_poisons_the_forward_pass(grid: Quantizer, value: float) -> None:
    weight = torch.randn(3, 256)
    weight[1, 5] = value
    with pytest.raises(ValueError, match=r"\[3, 256\] has values that are not finite"):
        grid.quantize(weight)
    assert torch.isnan(grid(weight)[1]).any()


SAMPLE = [*AFFINE[::29], *CLIPPED[::7], *BLOCKS[::3], NF4(), FP4()]


@every_grid(SAMPLE)
def test_a_matrix_without_rows_has_no_codes(grid: Quantizer) -> None:
    assert grid.quantize(torch.zeros(0, 128)).values.shape == grid(torch.zeros(0, 128)).shape == (0, 128)


@pytest.mark.parametrize("shape", [(4, 0), (0,), (128,), (2, 2, 128)])
@every_grid(SAMPLE)
def test_what_is_no_matrix_with_inputs_is_refused_with_its_shape(grid: Quantizer, shape: tuple[int, ...]) -> None:
    for call in (grid, grid.quantize):
        with pytest.raises(ValueError, match=rf"the weight \[{', '.join(map(str, shape))}\] cannot be quantized"):
            call(torch.zeros(shape))


@every_grid(SAMPLE)
def test_constant_rows_have_a_scale(grid: Quantizer) -> None:
    weight = torch.tensor([0.3, -2.0, 1e-4]).unsqueeze(1).expand(3, 128)
    assert ((grid(weight) - weight).abs() <= 0.35 * weight.abs()).all()


@pytest.mark.parametrize("grid", AFFINE, ids=grid_id)
def test_codes_scales_and_zero_points_equal_the_slow_reference(grid: Affine) -> None:
    for weight in weights():
        quantized = grid.quantize(weight[:2])
        num_groups = quantized.scale.shape[1]
        for row, group in itertools.product(range(2), range(num_groups)):
            chunk = weight[row].unflatten(0, (num_groups, -1))[group].tolist()
            expected = quantize_group(chunk, grid.bits, grid.symmetric, grid.scale_dtype)
            assert quantized.values[row].unflatten(0, (num_groups, -1))[group].tolist() == expected.codes
            assert quantized.scale[row, group].item() == expected.scale
            if quantized.zero_point is not None:
                assert quantized.zero_point[row, group].item() == expected.zero_point
