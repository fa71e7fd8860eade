"""Ranges of integer grids: the published errors, the closed form's constants, and every grid a projection."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch

from qaft.quant.ranges import _GAUSSIAN_LOADING, Range
from qaft.quant.scales import ScaleStorage


def make(
    kind: str, *, clip: float = 1.0, bits: int = 4, symmetric: bool = True, dtype: torch.dtype = torch.float32
) -> Range:
    return Range(kind=kind, clip=clip, bits=bits, symmetric=symmetric, storage=ScaleStorage(dtype))


def quantized(range_: Range, groups: torch.Tensor) -> torch.Tensor:
    return range_._quantized(groups, range_.fit(groups))


PUBLISHED = [
    (make("signed_absmax"), 10.6e-3, 19.0e-3),
    (make("absmax", symmetric=False), 10.1e-3, 19.5e-3),
    (make("absmax", symmetric=False, clip=0.95), 9.4e-3, 17.7e-3),
    (make("absmax", symmetric=False, clip=0.7), None, 12.0e-3),
    (make("absmax", clip=7 / 7.5), 12.3e-3, 21.6e-3),
    (make("mse"), 10.2e-3, 11.8e-3),
    (make("rms"), None, 11.9e-3),
]


@pytest.mark.parametrize(("range_", "small", "large"), PUBLISHED, ids=lambda value: getattr(value, "kind", str(value)))
def test_the_error_of_gaussian_weights_is_the_published_one(range_: Range, small: float | None, large: float) -> None:
    weight = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(1))
    for size, published in ((128, small), (4096, large)):
        if published is not None:
            groups = weight.unflatten(1, (-1, size))
            error = (quantized(range_, groups) - groups).square().sum() / weight.square().sum()
            assert error.item() == pytest.approx(published, rel=0.02)


def gaussian_error(loading: float, bits: int) -> float:
    """Squared error of a standard normal on levels s q, q in [-2^(b-1), 2^(b-1) - 1], s = loading / q_max, by quadrature."""
    q_max = 2 ** (bits - 1) - 1
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    step = loading / q_max
    levels = (x / step).round().clamp(-q_max - 1, q_max) * step
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return float(((x - levels).square() * density).sum() * 1e-4)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_closed_form_has_the_least_error_of_a_normal_distribution(bits: int) -> None:
    error = partial(gaussian_error, bits=bits)
    best = _GAUSSIAN_LOADING[bits]
    assert error(best) <= min(error(best * factor) for factor in (0.7, 0.9, 0.98, 1.02, 1.1, 1.3))
    weight = torch.randn(1, 1, 1 << 18, generator=torch.Generator().manual_seed(bits))
    measured = (quantized(make("rms", bits=bits), weight) - weight).square().mean().item()
    assert measured == pytest.approx(error(best), rel=0.03)


@pytest.mark.parametrize("size", [128, 4096])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_search_comes_within_two_percent_of_every_clip_tried_out(bits: int, symmetric: bool, size: int) -> None:
    groups = torch.randn(2**17 // size, 1, size, generator=torch.Generator().manual_seed(0))

    def error(range_: Range) -> torch.Tensor:
        return (quantized(range_, groups) - groups).square().sum(-1)

    least = error(make("absmax", bits=bits, symmetric=symmetric))
    for step in range(1, 40):
        least = torch.minimum(least, error(make("absmax", bits=bits, symmetric=symmetric, clip=1 - 0.02 * step)))
    found = error(make("mse", bits=bits, symmetric=symmetric))
    assert (found <= error(make("absmax", bits=bits, symmetric=symmetric))).all()
    assert found.sum() <= 1.02 * least.sum()


KINDS = [
    ("absmax", 1.0),
    ("absmax", 0.999),
    ("absmax", 0.95),
    ("absmax", 0.6),
    ("mse", 1.0),
    ("rms", 1.0),
    ("signed_absmax", 1.0),
]
ALL = [
    make(kind, clip=clip, bits=bits, symmetric=symmetric, dtype=dtype)
    for (kind, clip), bits, symmetric, dtype in itertools.product(
        KINDS, (2, 3, 4, 8), (True, False), (torch.float32, torch.bfloat16, torch.float16)
    )
    if symmetric or kind not in ("rms", "signed_absmax")
]


@pytest.mark.parametrize("range_", ALL, ids=lambda r: f"{r.kind}-{r.clip}-{r.bits}-{r.symmetric}-{r.storage.dtype}")
def test_every_grid_is_a_projection(range_: Range) -> None:
    generator = torch.Generator().manual_seed(3)
    gaussian = torch.randn(64, 4, 32, generator=generator)
    samples = [
        gaussian,
        gaussian.abs(),
        gaussian - 2,
        (gaussian * 4).round() / 2,
        gaussian.pow(5),
        gaussian.bfloat16().float(),
    ]
    samples += [torch.zeros(1, 1, 32), torch.full((2, 1, 32), -0.3), torch.eye(32).view(32, 1, 32)]
    for groups in samples:
        once = quantized(range_, groups)
        assert torch.equal(quantized(range_, once), once)


def test_a_signed_range_gives_the_extreme_the_lowest_level() -> None:
    groups = torch.tensor([[[4.0, -1.0, 0.5, -4.0], [-8.0, 7.9, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    scale, lowest = make("signed_absmax").fit(groups)
    assert scale[0, :2].tolist() == [-0.5, 1.0] and lowest.tolist() == [[-8, -8, -8]]
    assert quantized(make("signed_absmax"), groups)[0, :2].tolist() == [[4.0, -1.0, 0.5, -3.5], [-8.0, 7.0, 0.0, 1.0]]


def test_both_ends_of_an_asymmetric_range_are_clipped() -> None:
    groups = torch.tensor([[[-16.0, 14.0, 0.4, 5.0]]])
    scale, lowest = make("absmax", clip=0.5, symmetric=False).fit(groups)
    assert scale.item() == 1.0 and lowest.item() == -8
    assert quantized(make("absmax", clip=0.5, symmetric=False), groups).tolist() == [[[-8.0, 7.0, 0.0, 5.0]]]


def test_a_heavy_tail_is_not_given_more_than_its_extremes() -> None:
    groups = torch.tensor([[[1.0, -1.0, 1.0, -1.0]]])
    scale, _ = make("rms").fit(groups)
    assert scale.item() == pytest.approx(1 / 7, rel=2**-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "minmax"}, "range='minmax' must be one of absmax, mse, rms, signed_absmax"),
        ({"kind": "absmax", "clip": 0.0}, r"clip=0.0 must be in \(0, 1\]"),
        ({"kind": "absmax", "clip": 1.1}, r"clip=1.1 must be in \(0, 1\]"),
        ({"kind": "mse", "clip": 0.9}, "clip=0.9 applies to range absmax"),
        ({"kind": "rms", "symmetric": False}, "range='rms' is for symmetric grids"),
        ({"kind": "signed_absmax", "symmetric": False}, "range='signed_absmax' is for symmetric grids"),
    ],
)
def test_impossible_ranges_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
