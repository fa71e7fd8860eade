"""What is special to the orthogonal update: it is a rotation, and blocks and shuffles are where they should be."""

from __future__ import annotations

import math

import pytest
import torch

from qaft.bases.base import LinearSpec
from qaft.updates.gsoft import GSOFT


def trained(size: int, block: int, *, dtype: torch.dtype = torch.float64, std: float = 0.5, **options) -> GSOFT:
    update = GSOFT(LinearSpec(name="layer", out_features=12, in_features=size, dtype=dtype), block=block, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in update.parameters():
        parameter.data = std * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return update


def dense_q(update: GSOFT, size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return update.rotate(torch.eye(size, dtype=dtype)).detach().T


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 32 * 2**-23)])
@pytest.mark.parametrize("std", [0.05, 3.0])
def test_q_is_orthogonal_however_large_the_parameters(dtype: torch.dtype, tolerance: float, std: float) -> None:
    q = dense_q(trained(32, 8, dtype=dtype, std=std), 32, dtype)
    assert float((q.T @ q - torch.eye(32, dtype=dtype)).abs().max()) < tolerance
    assert not torch.allclose(q, torch.eye(32, dtype=dtype), atol=1e-2)


def test_q_is_the_product_of_dense_factors() -> None:
    update, size, block = trained(24, 4), 24, 4
    k = size // block

    def factor(entries: torch.Tensor) -> torch.Tensor:
        blocks = []
        for row in entries.detach():
            s = torch.zeros(block, block, dtype=torch.float64)
            s[tuple(torch.triu_indices(block, block, offset=1))] = row
            s = s - s.T
            eye = torch.eye(block, dtype=torch.float64)
            blocks.append((eye + s) @ torch.linalg.inv(eye - s))
        return torch.block_diag(*blocks)

    p = torch.zeros(size, size, dtype=torch.float64)
    for g in range(k):
        for c in range(block):
            p[c * k + g, g * block + c] = 1
    expected = p.T @ factor(update.left) @ p @ factor(update.right)
    torch.testing.assert_close(dense_q(update, size), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("size", "block"), [(64, 8), (64, 16), (64, 4), (72, 8), (96, 12)])
def test_q_is_dense_exactly_when_the_square_of_the_block_covers_the_input(size: int, block: int) -> None:
    density = float((dense_q(trained(size, block), size) != 0).double().mean())
    assert density == pytest.approx(min(1.0, block**2 / size))
    assert (density == 1) == (block >= math.sqrt(size))


def test_q_is_the_identity_bit_for_bit_at_the_start() -> None:
    update, x = GSOFT(LinearSpec(name="layer", out_features=4, in_features=32), block=8), torch.randn(5, 32)
    assert torch.equal(update.rotate(x), x)
    assert torch.equal(update.rotate(x.bfloat16()), x.bfloat16())


def test_without_scales_lengths_and_angles_of_the_rows_are_kept() -> None:
    update, w = trained(32, 8, scale=False), torch.randn(12, 32, dtype=torch.float64)
    merged = update.merge(w)
    torch.testing.assert_close(merged @ merged.T, w @ w.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.linalg.svdvals(merged), torch.linalg.svdvals(w), atol=1e-12, rtol=0)


def test_the_cayley_map_is_computed_in_fp32_under_16_bit_parameters() -> None:
    update = trained(32, 8, dtype=torch.bfloat16, std=0.3)
    x = torch.eye(32)
    q = update.rotate(x).detach().T
    assert float((q.T @ q - x).abs().max()) < 1e-6


def test_small_rotations_are_not_rounded_away_in_16_bits() -> None:
    update = trained(32, 8, dtype=torch.float32, std=1e-3)
    x = torch.randn(64, 32)
    # Where x itself is zero, nothing is added to the change that could round it away.
    x[:, ::2] = 0
    exact = (update.rotate(x) - x).detach()[:, ::2]
    rounded = update.rotate(x.bfloat16()).float().detach()[:, ::2]
    assert float((rounded - exact).norm() / exact.norm()) < 0.01


def test_the_input_the_output_and_the_inverses_are_kept_for_backward() -> None:
    update, kept = trained(256, 32, dtype=torch.float32), {}
    known = {p.untyped_storage().data_ptr() for p in update.parameters()}
    w = torch.randn(12, 256)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage().data_ptr()
        if key not in known:
            kept[key] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(100, 256, requires_grad=True)
    known |= {x.untyped_storage().data_ptr(), w.untyped_storage().data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        update(x, lambda v: v @ w.T)
    assert sum(kept.values()) == 4 * (100 * 12 + 2 * 256 * 32)


@pytest.mark.parametrize("block", [0, 1, 7, 64])
def test_blocks_that_do_not_divide_are_refused_with_those_that_do(block: int) -> None:
    spec = LinearSpec(name="layer", out_features=4, in_features=48)
    with pytest.raises(ValueError, match=rf"layer: block={block} must be .* divide the 48 .*; try 4, 8, 16"):
        GSOFT(spec, block=block)
