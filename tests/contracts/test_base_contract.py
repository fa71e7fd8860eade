"""The laws of every frozen layer, whatever its storage."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from qaft.bases import STORAGES, FrozenLinear, build_base
from qaft.quant.affine import Affine

OUT, IN = 48, 192
DTYPES = [torch.float32, torch.bfloat16]

CASES = [
    (storage, double) for storage in STORAGES for double in ([False, True] if storage in ("nf4", "fp4") else [False])
]
NAMES = [storage + ("-double" if double else "") for storage, double in CASES]


def make(case: tuple[str, bool], dtype: torch.dtype, *, seed: int = 0, bias: bool = True) -> FrozenLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    grid = {"int4": Affine(bits=4, group_size=64, symmetric=False, scale_dtype=dtype)}.get(
        case[0], Affine(bits=8, group_size=None, symmetric=True, scale_dtype=dtype)
    )
    return build_base(
        case[0],
        weight,
        torch.randn(OUT, generator=generator) if bias else None,
        dtype=dtype,
        grid_quantizer=grid,
        double_quant=case[1],
    )


@pytest.fixture(params=CASES, ids=NAMES)
def case(request: pytest.FixtureRequest) -> tuple[str, bool]:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_is_the_product_with_the_dequantized_weight(case: tuple[str, bool], dtype: torch.dtype) -> None:
    base = make(case, dtype)
    x = torch.randn(3, 5, IN, dtype=dtype)
    assert torch.equal(base.matmul(x), F.linear(x, base.dequantize().to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_adds_the_bias(case: tuple[str, bool], dtype: torch.dtype) -> None:
    base = make(case, dtype)
    x = torch.randn(3, IN, dtype=dtype)
    assert base.bias is not None and base.bias.dtype == dtype
    # inside the product, as nn.Linear has it: one rounding
    assert torch.equal(base(x), F.linear(x, base.dequantize().to(dtype), base.bias))
    assert torch.equal(make(case, dtype, bias=False)(x), base.matmul(x))


def test_gradient_of_the_input_is_that_of_a_dense_layer(case: tuple[str, bool]) -> None:
    base = make(case, torch.float32)
    x = torch.randn(4, 7, IN, requires_grad=True)
    functional = torch.randn(4, 7, OUT)
    (grad,) = torch.autograd.grad((base(x) * functional).sum(), x)
    (expected,) = torch.autograd.grad((F.linear(x, base.dequantize().float(), base.bias) * functional).sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_for_backward(case: tuple[str, bool]) -> None:
    base = make(case, torch.bfloat16)
    x = torch.randn(4, IN, dtype=torch.bfloat16, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        base(x)
    assert sum(kept) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_deterministic_and_no_worse_than_its_grid(case: tuple[str, bool], dtype: torch.dtype) -> None:
    base = make(case, dtype)
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    assert torch.equal(base.dequantize(), base.dequantize())
    assert base.dequantize().shape == (OUT, IN)
    limit = {"nf4": 0.11, "fp4": 0.2, "int4": 0.11, "int8": 0.01, "int8_group": 0.011}.get(case[0], 0.005)
    assert (base.dequantize().float() - weight).norm() < limit * weight.norm()


def test_packed_weights_come_back_in_the_dtype_of_computation(case: tuple[str, bool]) -> None:
    for dtype in DTYPES:
        base = make(case, dtype)
        assert base.dtype == dtype
        assert case[0] in ("bf16", "fp16", "fp32") or base.dequantize().dtype == dtype


def test_state_dict_round_trip_is_bit_equal(case: tuple[str, bool]) -> None:
    base, other = make(case, torch.bfloat16), make(case, torch.bfloat16, seed=1)
    assert not torch.equal(base.dequantize(), other.dequantize())
    other.load_state_dict(base.state_dict(), strict=True)
    assert torch.equal(base.dequantize(), other.dequantize())
    assert base.bias is not None and other.bias is not None and torch.equal(base.bias, other.bias)


def test_casting_a_packed_layer_does_not_move_its_weight(case: tuple[str, bool]) -> None:
    if case[0] in ("bf16", "fp16", "fp32"):
        pytest.skip("a dense layer has no grid to leave")
    base = make(case, torch.float32)
    cast = copy.deepcopy(base).to(torch.bfloat16)
    assert torch.equal(base.dequantize(), cast.dequantize())


def test_nothing_is_trainable(case: tuple[str, bool]) -> None:
    base = make(case, torch.float32)
    assert not list(base.parameters())
    assert not any(buffer.requires_grad for buffer in base.buffers())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_and_cpu_hold_the_same_weight(case: tuple[str, bool], dtype: torch.dtype) -> None:
    base = make(case, dtype)
    moved = copy.deepcopy(base).to("cuda")
    assert torch.equal(moved.dequantize().cpu(), base.dequantize())
