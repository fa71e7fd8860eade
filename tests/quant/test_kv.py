"""The KV cache: RoSTE's function, and that of vLLM's int4 kernel written out one vector at a time."""

from __future__ import annotations

import struct

import pytest
import torch

from qaft.quant.activation import TokenQuantizer
from qaft.quant.kv import KVQuantizer, RosteKV, VllmKV


def to_fp32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def without_low_bits(x: float) -> float:
    (bits,) = struct.unpack("i", struct.pack("f", x))
    return struct.unpack("f", struct.pack("i", bits & -16))[0]


def half_away(x: float) -> int:
    return int(to_fp32(x + 0.5)) if x >= 0 else int(to_fp32(x - 0.5))


def stored_vector(y: list[float]) -> list[float]:
    """Return what a vector reads back as after the kernel stored it: fp32 roundings as the kernel has them."""
    low, high = min(y), max(y)
    scale = max(to_fp32(to_fp32(high - low) / 15), to_fp32(1e-6))
    zero = min(15, max(0, half_away(to_fp32(-low / scale))))
    inverse = to_fp32(1 / scale)
    codes = [min(15, max(0, half_away(to_fp32(to_fp32(v * inverse) + zero)))) for v in y]
    return [to_fp32((code - zero) * without_low_bits(scale)) for code in codes]


def hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def signs(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0x9E3779B9)
    return 2.0 * torch.bernoulli(torch.full((size,), 0.5), generator=generator) - 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_the_int4_cache_equals_the_kernel_one_vector_at_a_time(head_dim: int, dtype: torch.dtype) -> None:
    # Multiples of 1/16: sums of the rotation are exact, whatever their order.
    x = (torch.randn(1, 2, 5, head_dim, generator=torch.Generator().manual_seed(0)) * 16).round().div(16).to(dtype)
    matrix = hadamard(head_dim)
    rotated = ((x.float() * signs(head_dim)) @ matrix).to(dtype).float()
    stored = torch.tensor([stored_vector(y) for y in rotated.flatten(0, 2).tolist()]).view(rotated.shape)
    expected = (stored @ matrix / head_dim * signs(head_dim)).to(dtype)
    torch.testing.assert_close(
        VllmKV(head_dim=head_dim)(x), expected, rtol=2e-6 if dtype == torch.float32 else 1e-2, atol=1e-5
    )


def test_the_inverse_rotation_gives_the_scores_of_a_rotated_query() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(7, 64, generator=generator), torch.randn(9, 64, generator=generator)
    matrix = hadamard(64)
    rotate = lambda x: (x * signs(64)) @ matrix  # noqa: E731
    stored = torch.tensor([stored_vector(y) for y in rotate(key).tolist()])
    scores = rotate(query) @ stored.T / 64
    torch.testing.assert_close(query @ VllmKV(head_dim=64)(key).T, scores, rtol=1e-4, atol=1e-3)


def test_a_constant_vector_survives_and_zeros_stay_zeros() -> None:
    x = torch.stack([torch.zeros(16), torch.full((16,), 2.0)])
    read = VllmKV(head_dim=16)(x)
    assert read[0].tolist() == [0.0] * 16
    torch.testing.assert_close(read[1], x[1], rtol=0.2, atol=0.1)


def test_the_cache_of_the_paper_is_the_asymmetric_grid_of_each_head_and_token() -> None:
    x = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(RosteKV(bits=4, clip=0.95)(x), TokenQuantizer(bits=4, symmetric=False, clip=0.95)(x))


@pytest.mark.parametrize("quantizer", [VllmKV(head_dim=32), RosteKV(bits=4, clip=0.9)], ids=["vllm", "roste"])
def test_the_gradient_is_that_of_the_identity_and_tokens_are_independent(quantizer: KVQuantizer) -> None:
    x = torch.randn(2, 2, 4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.randn(2, 2, 4, 32, generator=torch.Generator().manual_seed(1))
    read = quantizer(x)
    read.backward(upstream)
    assert x.grad is not None and torch.equal(x.grad, upstream)
    torch.testing.assert_close(quantizer(x[:, :1, 2:3]), read[:, :1, 2:3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("quantizer", "expected"),
    [(VllmKV(head_dim=128), 10.1e-3), (RosteKV(bits=4, clip=0.95), 9.4e-3)],
    ids=["vllm", "roste"],
)
def test_the_error_of_gaussian_heads_is_that_of_an_asymmetric_grid_of_128(
    quantizer: KVQuantizer, expected: float
) -> None:
    x = torch.randn(4096, 128, generator=torch.Generator().manual_seed(1))
    error = (quantizer(x) - x).square().sum() / x.square().sum()
    assert error.item() == pytest.approx(expected, rel=0.02)


def test_the_rotation_spreads_a_channel_of_outliers() -> None:
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 50
    inner = [i for i in range(64) if i != 5]

    def error(quantizer: KVQuantizer) -> float:
        return ((quantizer(x) - x)[:, inner].square().sum() / x[:, inner].square().sum()).item()

    assert error(VllmKV(head_dim=64)) == pytest.approx(0.096, rel=0.05)
    assert error(RosteKV(bits=4)) == pytest.approx(0.462, rel=0.05)


@pytest.mark.parametrize("head_dim", [80, 96, 1])
def test_a_head_dim_without_an_int4_cache_is_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim={head_dim} must be a power of two for the int4 KV cache of vLLM"):
        VllmKV(head_dim=head_dim)


def test_another_head_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="the last axis must be head_dim=64"):
        VllmKV(head_dim=64)(torch.zeros(1, 1, 1, 32))


def test_casting_the_module_leaves_the_rotation_exact() -> None:
    x = torch.randn(3, 32)
    assert torch.equal(VllmKV(head_dim=32).to(torch.bfloat16)(x), VllmKV(head_dim=32)(x))
