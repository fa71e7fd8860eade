"""Row scales times a factor: the codes stay, and nothing but the scale is rounded."""

from __future__ import annotations

import pytest
import torch

from qaft.bases import build_base
from qaft.bases.affine import AffineBase
from qaft.bases.bnb import FourBitBase
from qaft.bases.row_scaled import row_scaled
from qaft.quant.affine import Affine


def drawn(width: int = 64) -> torch.Tensor:
    return torch.randn(12, width, generator=torch.Generator().manual_seed(0))


FACTOR = torch.linspace(-1.5, 2.0, 12)


@pytest.mark.parametrize("storage", ["fp32", "nf4", "fp4", "int8"])
def test_dequantized_rows_are_scaled_to_one_rounding(storage: str) -> None:
    base = build_base(storage, drawn(), None, dtype=torch.float32)
    before = {name: buffer.clone() for name, buffer in base.named_buffers()}
    scaled = row_scaled(base, FACTOR, name="x")
    torch.testing.assert_close(scaled.dequantize(), FACTOR.unsqueeze(1) * base.dequantize(), rtol=3e-7, atol=0)
    assert all(torch.equal(buffer, before[name]) for name, buffer in base.named_buffers())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_affine_codes_and_zero_points_stay_and_scales_are_rounded_to_their_dtype(
    dtype: torch.dtype, symmetric: bool
) -> None:
    grid = Affine(bits=4, group_size=16, symmetric=symmetric, scale_dtype=dtype)
    base = AffineBase.from_weight(drawn(), torch.ones(12), grid, dtype=dtype)
    scaled = row_scaled(base, FACTOR, name="x")
    assert isinstance(scaled, AffineBase)
    assert scaled.weight_packed is base.weight_packed and scaled.bias is base.bias
    assert scaled.weight_zero_point is base.weight_zero_point
    assert torch.equal(scaled.weight_scale, (base.weight_scale.float() * FACTOR.unsqueeze(1)).to(dtype))


def test_a_scale_of_two_rows_or_a_quantized_one_is_refused() -> None:
    across = FourBitBase.from_weight(drawn(96), None, dtype=torch.float32)
    with pytest.raises(ValueError, match="q_proj: blocks of 64 weights cross its rows of 96"):
        row_scaled(across, FACTOR, name="q_proj")
    nested = FourBitBase.from_weight(drawn(), None, dtype=torch.float32, double_quant=True)
    with pytest.raises(ValueError, match="q_proj: its block scales are quantized"):
        row_scaled(nested, FACTOR, name="q_proj")
