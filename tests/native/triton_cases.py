"""The Triton kernels in Triton's interpreter, which must be chosen before it is imported: see ``test_triton.py``."""

from __future__ import annotations

import numpy
import pytest
import torch

from qaft.native.triton_numerics import probe
from qaft.quant import Affine, TokenQuantizer
from qaft.quant.triton_affine import fake_quantize, supports
from qaft.quant.triton_token import fake_quantize_tokens
from qaft.rotation.sylvester import reference
from qaft.rotation.triton_sylvester import sylvester_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = {
    "symmetric": {},
    "symmetric, clipped": {"clip": 0.9},
    "asymmetric": {"symmetric": False, "bits": 2},
    "asymmetric, clipped": {"symmetric": False, "clip": 0.95, "ste": "trust"},
    "int8, odd groups": {"bits": 8, "group_size": 48},
}
TOKENS = {
    "symmetric": {},
    "clipped": {"clip": 0.9, "ste": "clamp"},
    "asymmetric": {"bits": 4, "symmetric": False},
    "asymmetric, clipped": {"bits": 4, "symmetric": False, "clip": 0.95, "ste": "trust"},
}


@pytest.fixture(autouse=True)
def _quiet():
    # The interpreter computes with NumPy, which reports what a GPU does not: NaN from infinities.
    with numpy.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 64, 256, 1024, 4096])
def test_butterflies_have_the_bits_of_the_reference(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(sylvester_rows(x, scale=size**-0.5), reference(x, scale=size**-0.5))


def weights(grid: Affine) -> torch.Tensor:
    """Rows of all magnitudes, zeros, decision boundaries and their neighbours, a NaN, and a row on the grid."""
    w = torch.randn(16, 192, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 16).unsqueeze(1)
    halves = (torch.arange(192) % 29 - 14) / 2
    infinity = torch.tensor(float("inf"))
    w[0], w[1] = 0, halves
    w[2], w[3] = torch.nextafter(halves, infinity) * 0.3, torch.nextafter(halves, -infinity)
    w[4] = grid(w[4:5])[0]
    w[5, 7] = float("nan")
    return w


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
def test_weights_have_the_bits_of_the_reference(options: dict, scale_dtype: torch.dtype) -> None:
    grid = Affine(**{"group_size": 32, **options}, scale_dtype=scale_dtype)
    assert grid.group_size is not None and supports(grid.range, grid.group_size)
    groups = weights(grid).unflatten(-1, (-1, grid.group_size))
    levels, scale, _, expected_mask = grid.range.levels(groups, ste=grid.ste, masked=True)
    values, mask = fake_quantize(groups, grid.range, ste=grid.ste, masked=True)
    torch.testing.assert_close(values, levels * scale.unsqueeze(-1), rtol=0, atol=0, equal_nan=True)
    assert mask is not None and expected_mask is not None and torch.equal(mask, expected_mask)
    assert fake_quantize(groups, grid.range, ste=grid.ste, masked=False)[1] is None


def test_16_bit_latents_are_quantized_as_their_fp32_values() -> None:
    grid = Affine(group_size=64)
    groups = torch.randn(4, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, _ = fake_quantize(groups, grid.range, ste="clamp", masked=False)
    assert torch.equal(values.flatten(1), grid(groups.flatten(1)))


def test_the_probe_runs() -> None:
    probe(torch.device("cpu"))


def test_ranges_that_search_have_no_kernel() -> None:
    assert not supports(Affine(range="mse").range, 128)
    assert not supports(Affine(range="signed_absmax").range, 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", TOKENS.values(), ids=TOKENS)
def test_tokens_have_the_bits_of_the_reference(options: dict, dtype: torch.dtype) -> None:
    quantizer = TokenQuantizer(**options)
    x = torch.randn(12, 515, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 2, 12).unsqueeze(1)
    x[0], x[1], x[2] = 0, -1, x[2].abs()
    x[3, 5], x[4, 2], x[5, 1] = float("nan"), -float("nan"), float("inf")
    x = x.to(dtype)
    masked = quantizer.clip < 1
    expected, expected_mask = quantizer._in_torch(x, x.shape, masked=masked)
    kinds = {name: getattr(quantizer, name) for name in ("bits", "symmetric", "clip", "ste")}
    found, mask = fake_quantize_tokens(x, **kinds, masked=masked)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    if mask is not None and expected_mask is not None:
        assert torch.equal(mask, expected_mask)
