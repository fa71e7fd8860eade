from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

import qaft.quant.base as quant_base
from qaft.bases.affine import AffineBase
from qaft.quant import NF4, Affine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def base_of(grid: Affine, dtype: torch.dtype, *, in_features: int = 256) -> AffineBase:
    weight = torch.randn(24, in_features, generator=torch.Generator().manual_seed(6))
    return AffineBase.from_weight(weight, torch.arange(24.0), grid, dtype=dtype)


@pytest.mark.parametrize(
    ("bits", "symmetric", "scale_dtype", "dtype"),
    list(itertools.product(range(2, 9), (True, False), DTYPES, DTYPES)),
)
def test_dequantize_rounds_the_fp32_product_once(
    bits: int, symmetric: bool, scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    grid = Affine(bits=bits, group_size=64, symmetric=symmetric, scale_dtype=scale_dtype)
    base = base_of(grid, dtype)
    weight = base.dequantize()
    assert weight.dtype == dtype
    assert torch.equal(weight, base.qtensor().dequantize(dtype))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_base_holds_exactly_the_codes_it_was_given(bits: int, symmetric: bool) -> None:
    grid = Affine(bits=bits, group_size=64, symmetric=symmetric)
    quantized = grid.quantize(torch.randn(24, 256))
    assert AffineBase(quantized, None, bits=bits, dtype=torch.bfloat16).qtensor().equals(quantized)


@pytest.mark.parametrize("in_features", [1, 5, 8, 30, 33])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rows_that_do_not_fill_their_last_word_dequantize(bits: int, in_features: int) -> None:
    base = base_of(Affine(bits=bits, group_size=None, symmetric=False), torch.bfloat16, in_features=in_features)
    assert torch.equal(base.dequantize(), base.qtensor().dequantize(torch.bfloat16))


def test_the_result_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(Affine(symmetric=False, scale_dtype=torch.bfloat16), torch.bfloat16)
    whole = base.dequantize()
    monkeypatch.setattr(quant_base, "_BLOCK_WEIGHTS", 256)
    assert torch.equal(base.dequantize(), whole)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (4, None), (8, 64), (3, 64)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_compressed_tensors_reads_the_buffers_as_they_are(
    bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    grid = Affine(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    base = base_of(grid, scale_dtype)
    args = QuantizationArgs(
        num_bits=bits, group_size=group_size, strategy="group" if group_size else "channel", symmetric=symmetric
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {name: value for name, value in base.state_dict().items() if name != "bias"}
    state["weight_shape"] = torch.tensor([base.out_features, base.in_features])
    decompressed = PackedQuantizationCompressor.decompress(state, scheme)
    assert torch.equal(decompressed["weight"], base.dequantize())


def test_four_bits_take_half_a_byte_per_weight_and_the_scales() -> None:
    base = base_of(Affine(group_size=128, scale_dtype=torch.bfloat16), torch.bfloat16)
    stored = sum(buffer.numel() * buffer.element_size() for name, buffer in base.named_buffers() if name != "bias")
    assert stored == 24 * 256 // 2 + 24 * 2 * 2
    assert list(base.parameters()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_module_does_not_round_the_scales(dtype: torch.dtype) -> None:
    base = base_of(Affine(), torch.float32)
    before = base.dequantize()
    base.to(dtype)
    assert base.weight_scale.dtype == torch.float32
    assert base.bias is not None and base.bias.dtype == dtype
    assert torch.equal(base.dequantize(), before)


def test_a_copy_and_a_reloaded_state_give_the_same_weight() -> None:
    grid = Affine(symmetric=False)
    base, other = (
        base_of(grid, torch.bfloat16),
        AffineBase.from_weight(torch.zeros(24, 256), torch.zeros(24), grid, dtype=torch.bfloat16),
    )
    other.load_state_dict(base.state_dict())
    assert torch.equal(other.dequantize(), base.dequantize())
    assert torch.equal(copy.deepcopy(base).dequantize(), base.dequantize())


def test_the_layer_is_a_linear_map_with_bias_and_input_gradient() -> None:
    base = base_of(Affine(symmetric=False), torch.float32)
    x = torch.randn(3, 256, requires_grad=True)
    y = base(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(y, F.linear(x, base.dequantize()) + torch.arange(24.0))
    torch.testing.assert_close(x.grad, base.dequantize().sum(0).expand(3, -1))


def test_indices_of_a_code_book_are_refused() -> None:
    with pytest.raises(ValueError, match="these are indices of a code book"):
        AffineBase(NF4().quantize(torch.randn(2, 64)), None, bits=4, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_dequantizes_to_the_same_weight(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    base = base_of(Affine(bits=bits, symmetric=symmetric), dtype)
    expected = base.dequantize()
    assert torch.equal(base.cuda().dequantize().cpu(), expected)
