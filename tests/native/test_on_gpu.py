"""On a GPU, where the Triton kernels are chosen by themselves: the numbers of the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch

from qaft.quant import Affine, TokenQuantizer
from qaft.rotation.blocks import BlockDiagonal
from qaft.rotation.hadamard import Hadamard

pytestmark = pytest.mark.gpu

GRIDS = [
    {},
    {"symmetric": False, "scale_dtype": torch.bfloat16},
    {"clip": 0.9, "scale_dtype": torch.float16},
    {"group_size": None, "bits": 8},
    {"range": "signed_absmax"},
]


@pytest.mark.parametrize("options", GRIDS)
def test_weights_and_their_gradients_are_those_of_a_cpu(options: dict, generator: torch.Generator) -> None:
    grid = Affine(**options)
    weight = torch.randn(64, 1024, generator=generator)
    here, there = weight.clone().requires_grad_(), weight.cuda().requires_grad_()
    assert torch.equal(grid(there).cpu(), grid(here))
    grid(there).sum().backward()
    grid(here).sum().backward()
    assert here.grad is not None and there.grad is not None and torch.equal(there.grad.cpu(), here.grad)
    # What is exported is what the kernel computed.
    assert torch.equal(grid.quantize(there).dequantize(torch.float32), grid(there))


@pytest.mark.parametrize("options", [{}, {"bits": 4, "symmetric": False, "clip": 0.95, "ste": "clamp"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_a_cpu(options: dict, dtype: torch.dtype, generator: torch.Generator) -> None:
    quantizer = TokenQuantizer(**options)
    x = torch.randn(33, 11008, generator=generator).to(dtype)
    assert torch.equal(quantizer(x.cuda()).cpu(), quantizer(x))


@pytest.mark.parametrize("width", [4096, 8192, 11008, 14336])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_online_rotations_are_those_of_a_cpu(width: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    rotation = BlockDiagonal(width, Hadamard(width & -width))
    x = torch.randn(17, width, generator=generator).to(dtype)
    expected = rotation(x)
    assert torch.equal(rotation.cuda()(x.cuda()).cpu(), expected)
