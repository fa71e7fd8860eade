"""The kernel of CPUs has the bits of the reference in torch, and both are the product with the matrix."""

from __future__ import annotations

import pytest
import torch

from qaft.native.build import compiler, library
from qaft.rotation.hadamard import Hadamard
from qaft.rotation.orders import hadamard_matrix
from qaft.rotation.sylvester import reference, sylvester

SIZES = [16, 32, 64, 128, 256, 512, 2048, 8192, 32768]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

with_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


@with_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_has_the_bits_of_the_reference(size: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    assert library("hadamard") is not None
    x = (torch.randn(3, 2, size, generator=generator) * torch.logspace(-30, 3, 3).view(3, 1, 1)).to(dtype)
    assert torch.equal(sylvester(x, scale=size**-0.5), reference(x, scale=size**-0.5))


@with_compiler
@pytest.mark.parametrize("inner", [1, 5, 16, 70])
@pytest.mark.parametrize("size", [16, 32, 64, 128, 4096])
def test_any_axis_has_the_bits_of_the_reference(size: int, inner: int, generator: torch.Generator) -> None:
    x = torch.randn(2, size, inner, generator=generator)
    before = x.clone()
    assert torch.equal(sylvester(x, dim=1, scale=0.3), reference(x, dim=1, scale=0.3))
    assert torch.equal(sylvester(x.transpose(0, 1), dim=0), reference(x.transpose(0, 1), dim=0))
    assert torch.equal(x, before)


@pytest.mark.parametrize("function", [reference, sylvester])
@pytest.mark.parametrize("size", [1, 2, 8, 64, 512])
def test_it_is_the_product_with_sylvesters_matrix(size: int, function) -> None:
    # Integers: every sum is exact.
    x = torch.arange(3 * size, dtype=torch.float32).view(3, size).remainder(7) - 3
    assert torch.equal(function(x), (x.double() @ hadamard_matrix(size)).float())


@with_compiler
def test_the_number_of_threads_does_not_matter(generator: torch.Generator) -> None:
    x = torch.randn(9, 43, 256, generator=generator).bfloat16()
    expected = sylvester(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(sylvester(x), expected)
        assert torch.equal(sylvester(x.transpose(1, 2), dim=1).transpose(1, 2), expected)
    finally:
        torch.set_num_threads(1)


def test_the_gradient_is_the_transform_of_the_gradient(generator: torch.Generator) -> None:
    x = torch.randn(4, 64, generator=generator, requires_grad=True)
    grad = torch.randn(4, 64, generator=generator)
    sylvester(x, scale=0.125).backward(grad)
    assert x.grad is not None and torch.equal(x.grad, reference(grad, scale=0.125))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_not_finite_makes_its_vector_nan_or_infinite(dtype: torch.dtype) -> None:
    x = torch.ones(2, 32, dtype=dtype)
    x[1, 3] = float("nan")
    assert torch.isnan(sylvester(x)[1]).all() and torch.isfinite(sylvester(x)[0]).all()


@pytest.mark.parametrize("size", [64, 512])
def test_activations_are_rotated_without_signs_in_one_transform(size: int, generator: torch.Generator) -> None:
    x = torch.randn(3, 2, size, generator=generator).bfloat16()
    rotation = Hadamard(size)
    assert torch.equal(rotation(x), reference(x, scale=size**-0.5))
    assert torch.equal(rotation.inverse(x), rotation(x))
