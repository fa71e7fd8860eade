"""The code books of bitsandbytes against the library itself, code for code, and against closed forms."""

from __future__ import annotations

import itertools
import math

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qaft.quant import CODE_BOOKS, FP4, NF4, CodeBook, QTensor
from qaft.quant.codebook import num_below, tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CPU = torch.device("cpu")

every_book = pytest.mark.parametrize("book", CODE_BOOKS.values(), ids=CODE_BOOKS)


def packed(quantized: QTensor) -> Tensor:
    """Two indices per byte, the first in the high nibble: the storage of bitsandbytes."""
    indices = quantized.values.to(torch.uint8).view(-1, 2)
    return ((indices[:, :1] << 4) | indices[:, 1:]).contiguous()


def weights(width: int = 256) -> list[Tensor]:
    """Gaussian rows of several sizes with zeros of both signs and blocks of them, signs alone, and coarse values."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(16, width, generator=generator) * torch.logspace(-4, 2, 16).unsqueeze(1)
    gaussian[3] = 0.0
    gaussian[4, :64] = 0.0
    gaussian[5] = gaussian[5].abs()
    gaussian[6] = -0.0
    gaussian[7, ::3], gaussian[7, 1::3] = 0.0, -0.0
    return [gaussian, gaussian.sign(), (gaussian * 8).round() / 8]


def boundary_weights(book: type[CodeBook]) -> Tensor:
    """Blocks whose values are the decision boundaries and their neighbours in fp32, for maxima of 1 and others."""
    bounds = tables(book.levels, CPU).bounds
    infinity = torch.tensor(float("inf"))
    near = torch.cat([bounds, torch.nextafter(bounds, infinity), torch.nextafter(bounds, -infinity)])
    block = torch.cat([torch.tensor([1.0]), near, torch.zeros(64 - 1 - len(near))])
    return block * torch.tensor([1.0, -1.0, 3.0, 0.7, 1e-3, 123.456, 2.0**-40, 1e-39]).unsqueeze(1)


def assert_codes_of_bitsandbytes(book: type[CodeBook], weight: Tensor, group_size: int) -> None:
    theirs, state = bnb.quantize_4bit(weight, blocksize=group_size, compress_statistics=False, quant_type=book.kind)
    quantized = book(group_size=group_size).quantize(weight)
    assert torch.equal(packed(quantized), theirs)
    assert torch.equal(quantized.scale.flatten(), state.absmax)


@every_book
def test_the_levels_are_those_of_bitsandbytes(book: type[CodeBook]) -> None:
    assert torch.equal(tables(book.levels, CPU).codebook, bnb.get_4bit_type(book.kind, device="cpu"))


@every_book
@pytest.mark.parametrize("group_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_are_bit_equal_to_bitsandbytes(
    book: type[CodeBook], dtype: torch.dtype, group_size: int
) -> None:
    for weight in (*weights(max(256, group_size)), boundary_weights(book).repeat(1, max(4, group_size // 64))):
        assert_codes_of_bitsandbytes(book, weight.to(dtype), group_size)


@every_book
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_has_the_code_that_bitsandbytes_gives_it(book: type[CodeBook], dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    for largest in (1.0, 0.37, 2.0**-20, numbers[numbers.isfinite()].max().item()):
        smaller = numbers[numbers.abs() <= largest]
        smaller = smaller[: len(smaller) // 63 * 63].view(-1, 63)
        blocks = torch.cat([torch.full((len(smaller), 1), largest), smaller], 1)
        assert_codes_of_bitsandbytes(book, blocks.to(dtype), 64)


@every_book
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_weights_are_bit_equal_to_bitsandbytes(book: type[CodeBook], dtype: torch.dtype) -> None:
    for weight in weights():
        weight = weight.to(dtype)
        theirs, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type=book.kind)
        assert torch.equal(book().quantize(weight).dequantize(dtype), bnb.dequantize_4bit(theirs, state))


@every_book
def test_counting_boundaries_equals_a_binary_search(book: type[CodeBook]) -> None:
    bounds = tables(book.levels, CPU).bounds
    x = torch.cat([boundary_weights(book).flatten(), torch.linspace(-1.1, 1.1, 1001)])
    assert torch.equal(num_below(x, bounds), torch.bucketize(x, bounds))


@every_book
def test_ranks_order_the_codes_by_their_levels(book: type[CodeBook]) -> None:
    table = tables(book.levels, CPU)
    codes = torch.arange(16) if table.codes is None else table.codes.long()
    assert sorted(codes.tolist()) == list(range(16)) and torch.equal(table.ranks[codes], torch.arange(16))
    assert torch.equal(table.codebook[codes], table.levels) and torch.equal(table.levels.sort().values, table.levels)


def gaussian_error(levels: tuple[float, ...], size: int) -> float:
    """Return E (w - w^)^2 / E w^2 of normal weights in blocks of ``size``: the maximum of a block has its density, the
    others are normal between the maxima of both signs; integrated numerically over the maximum in fp64."""
    m = torch.linspace(1e-3, 8, 4001, dtype=torch.float64)

    def density(x: Tensor) -> Tensor:
        return (-x.square() / 2).exp() / math.sqrt(2 * math.pi)

    within = 2 * torch.special.ndtr(m) - 1
    error = torch.zeros_like(m)
    ordered = sorted(levels)
    edges = [-1.0, *((a + b) / 2 for a, b in itertools.pairwise(ordered)), 1.0]
    for level, (low, high) in zip(ordered, itertools.pairwise(edges), strict=True):
        at, a, b = level * m, low * m, high * m
        mass = torch.special.ndtr(b) - torch.special.ndtr(a)
        first = density(a) - density(b)
        second = mass + a * density(a) - b * density(b)
        error += second - 2 * at * first + at.square() * mass
    of_maximum = size * within ** (size - 1) * 2 * density(m)
    return float(torch.trapezoid(of_maximum * error / within, m)) * (size - 1) / size


@pytest.mark.parametrize(
    ("book", "group_size", "expected"),
    [
        (NF4, 64, 8.46e-3),
        (NF4, 128, 9.14e-3),
        (NF4, 4096, 12.08e-3),
        (FP4, 64, 14.87e-3),
        (FP4, 128, 16.53e-3),
        (FP4, 4096, 24.86e-3),
    ],
)
def test_the_error_of_gaussian_weights_is_its_integral(book: type[CodeBook], group_size: int, expected: float) -> None:
    assert gaussian_error(book.levels, group_size) == pytest.approx(expected, rel=1e-3)
    rows = max(64, group_size // 4)
    weight = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(1))
    error = (book(group_size=group_size)(weight) - weight).square().sum() / weight.square().sum()
    assert error.item() == pytest.approx(expected, rel=0.02)


@every_book
def test_dither_fills_the_decision_cells_and_keeps_the_maximum(book: type[CodeBook]) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(4))
    grid = book()
    quantized = grid.quantize(weight)
    latents = grid.dither(quantized, torch.Generator().manual_seed(0))
    relative = latents.view(-1, 64) / quantized.scale.view(-1, 1)
    assert (relative.abs() == 1).sum(1).tolist() == [1] * len(relative)
    table = tables(book.levels, CPU)
    ranks = table.ranks[quantized.values.view(-1, 64).long()]
    for rank in range(1, 15):
        inside = relative[ranks == rank]
        position = (inside - table.bounds[rank - 1]) / (table.bounds[rank] - table.bounds[rank - 1])
        assert 0 < position.min() and position.max() < 1
        # The standard deviation of a mean of uniform positions, 5 times.
        assert position.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * len(inside)))
    assert torch.equal(grid(latents), quantized.dequantize(torch.float32))


@every_book
def test_every_code_has_latents(book: type[CodeBook]) -> None:
    codes = torch.arange(16, dtype=torch.int8).repeat(3, 4)
    scale = torch.tensor([[1.0], [0.37], [2.0**-30]])
    quantized = QTensor(codes, scale, codebook=tables(book.levels, CPU).codebook)
    grid = book()
    assert grid.quantize(grid.dither(quantized, torch.Generator().manual_seed(0))).equals(quantized)


@every_book
def test_small_updates_are_felt_by_dithered_latents_and_lost_on_the_grid(book: type[CodeBook]) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(512, 512, generator=generator)
    delta = torch.randn(512, 8, generator=generator) @ torch.randn(8, 512, generator=generator)
    delta *= 0.02 * weight.norm() / delta.norm()
    grid = book()
    quantized = grid.quantize(weight)

    def projection(latents: Tensor) -> float:
        realised = grid(latents + delta) - grid(latents)
        return ((realised * delta).sum() / delta.square().sum()).item()

    assert projection(grid.dither(quantized, generator)) == pytest.approx(1.0, abs=0.05)
    assert abs(projection(quantized.dequantize(torch.float32))) <= 0.1


@every_book
@pytest.mark.parametrize(("in_features", "advice"), [(96, "use 32"), (576 + 32, "use 32"), (577, "no {} block size")])
def test_blocks_that_would_cross_rows_are_refused(book: type[CodeBook], in_features: int, advice: str) -> None:
    message = f"in_features={in_features} is not divisible by group_size=64: {advice.format(book.kind)}"
    with pytest.raises(ValueError, match=message):
        book().quantize(torch.randn(2, in_features))


@every_book
def test_a_block_without_its_maximum_is_refused_by_dither(book: type[CodeBook]) -> None:
    quantized = QTensor(torch.full((1, 64), 9, dtype=torch.int8), torch.ones(1, 1))
    with pytest.raises(ValueError, match=f"no result of {book.__name__}"):
        book().dither(quantized, torch.Generator())
