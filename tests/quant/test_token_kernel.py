"""The one-pass kernel of CPUs has the bits of the reference in torch."""

from __future__ import annotations

import pytest
import torch

from qaft.native.build import compiler, library
from qaft.quant import TokenQuantizer

GRIDS = {
    "symmetric": {},
    "int4": {"bits": 4},
    "symmetric, clipped": {"clip": 0.9, "ste": "clamp"},
    "asymmetric": {"bits": 4, "symmetric": False},
    "asymmetric, clipped": {"bits": 4, "symmetric": False, "clip": 0.95, "ste": "trust"},
}


def tokens(width: int, generator: torch.Generator) -> torch.Tensor:
    """Vectors of all magnitudes, of zeros, of one sign, on decision boundaries, and with values that are not finite."""
    x = torch.randn(40, width, generator=generator) * torch.logspace(-40, 20, 40).unsqueeze(1)
    x[0], x[1], x[2] = 0, -1, x[2].abs()
    x[3] = ((torch.arange(width) - width // 2) / 2).clamp(-7, 7)
    x[4] = -0.0
    for row, value in enumerate((float("nan"), -float("nan"), float("inf"), -float("inf"))):
        x[5 + row, row] = value
    return x


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 64, 515])
@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
def test_values_and_masks_have_the_bits_of_the_reference(
    options: dict, width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    assert library("token") is not None
    quantizer = TokenQuantizer(**options)
    x = tokens(max(width, 4), generator)[:, :width].to(dtype)
    masked = quantizer.clip < 1
    found, found_mask = quantizer._quantized(x, masked=masked)
    expected, expected_mask = quantizer._in_torch(x, x.shape, masked=masked)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert (found_mask is None) == (not masked)
    if found_mask is not None and expected_mask is not None:
        assert torch.equal(found_mask, expected_mask)
