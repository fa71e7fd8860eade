from __future__ import annotations

import pytest
import torch

from qaft.quant.scales import ScaleStorage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_scales_are_rounded_to_nearest_and_stepped_to_their_neighbour(dtype: torch.dtype) -> None:
    storage = ScaleStorage(dtype)
    scale = torch.cat([torch.logspace(-4, 4, 1000), 2.0 ** torch.arange(-10, 10).float()])
    stored = storage.round(scale)
    assert torch.equal(stored, scale.to(dtype).float())
    below = torch.nextafter(scale.to(dtype), torch.zeros(1, dtype=dtype))
    assert torch.equal(storage.next_smaller(stored), below.float())


def test_fp32_scales_are_truncated_to_sixteen_significant_bits() -> None:
    storage = ScaleStorage(torch.float32)
    scale = torch.logspace(-30, 30, 1000)
    stored = storage.round(scale)
    mantissa, exponent = torch.frexp(scale)
    assert torch.equal(stored, torch.ldexp((mantissa * 2**16).floor() / 2**16, exponent))
    steps = torch.frexp(storage.next_smaller(stored)).mantissa * 2**16
    assert torch.equal(steps, steps.round()) and (storage.next_smaller(stored) < stored).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_is_at_least_the_smallest_normal_number_and_a_nan_stays_one(dtype: torch.dtype) -> None:
    stored = ScaleStorage(dtype).round(torch.tensor([0.0, 1e-44, float("nan"), float("inf")]))
    assert stored[:2].tolist() == [torch.finfo(dtype).tiny] * 2
    assert torch.isnan(stored[2]) and torch.isinf(stored[3])


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scale_dtype=torch\.float64 must be one of torch\.float32"):
        ScaleStorage(torch.float64)
