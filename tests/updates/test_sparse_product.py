"""The sparse product against a dense one, and what is kept of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaft.bases.base import LinearSpec
from qaft.native import build
from qaft.updates import sparse_product
from qaft.updates.block_product import BlockGroups, block_linear
from qaft.updates.sift import Sift
from qaft.updates.sparse_product import EntryOrder, sparse_linear

OUT, IN = 6, 128


def problem(width: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(OUT * IN // width, generator=generator)[:count].sort().values.int()
    return places, torch.randn(count, width, generator=generator).to(dtype)


def dense(places: Tensor, values: Tensor) -> Tensor:
    flat = torch.zeros(OUT * IN // values.shape[1], values.shape[1], dtype=values.dtype)
    return flat.index_add(0, places, values).view(OUT, IN)


def product(x: Tensor, values: Tensor, places: Tensor, scale: float = 1.0) -> Tensor:
    """What ``Sift`` does with entries, and with blocks."""
    columns = IN // values.shape[1]
    if values.shape[1] == 1:
        return sparse_linear(x, values, places, EntryOrder.of(places, (OUT, IN)), scale=scale)
    return block_linear(x, values, BlockGroups.of(places, columns), scale=scale, out_features=OUT)


@pytest.mark.parametrize(("width", "count"), [(1, 1), (1, 40), (1, OUT * IN), (64, 3), (64, 12)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.1)])
def test_product_and_gradients_are_those_of_the_dense_matrix(
    width: int, count: int, dtype: torch.dtype, tolerance: float
) -> None:
    places, values = problem(width, count, dtype)
    x = torch.randn(3, 5, IN, dtype=dtype, requires_grad=True)
    values.requires_grad_()
    functional = torch.randn(3, 5, OUT, dtype=dtype)
    found = product(x, values, places, scale=0.5)
    expected = F.linear(x, 0.5 * dense(places, values))
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    ours, theirs = (torch.autograd.grad((y * functional).sum(), [x, values]) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2 * tolerance, rtol=2 * tolerance)


def everything(
    x: Tensor, values: Tensor, places: Tensor, shape: tuple[int, int], functional: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The product and both gradients."""
    inputs = [x.detach().requires_grad_(), values.detach().requires_grad_()]
    y = sparse_linear(*inputs, places, EntryOrder.of(places, shape), scale=0.5)
    return y.detach(), *torch.autograd.grad((y * functional).sum(), inputs)


@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features", "count"),
    [
        (1, 1, 1, 1),
        (7, 5, 3, 9),
        (33, 16, 48, 40),
        (64, 47, 33, 300),
        (100, 70, 129, 90),
        (32, 16, 16, 0),
        (0, 4, 4, 3),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_the_kernel_and_torch_give_the_product_in_every_shape(
    tokens: int,
    out_features: int,
    in_features: int,
    count: int,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    size, shape = out_features * in_features, (out_features, in_features)
    places = torch.randperm(size, generator=generator)[:count].sort().values.int()
    values = torch.randn(count, 1, generator=generator).to(dtype)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    functional = torch.randn(tokens, out_features, generator=generator).to(dtype)
    wide_x, wide_values, wide_functional = x.double(), values.double(), functional.double()
    matrix = torch.zeros(size, dtype=torch.float64).index_add(0, places, 0.5 * wide_values.flatten()).view(shape)
    full = 0.5 * (wide_functional.T @ wide_x).flatten()[places.long()]
    expected = (wide_x @ matrix.T, wide_functional @ matrix, full.view(-1, 1))
    assert build.library("sparse") is not None
    by_kernel = everything(x, values, places, shape, functional)
    monkeypatch.setattr(sparse_product, "library", lambda name: None)
    in_torch = everything(x, values, places, shape, functional)
    for found in (by_kernel, in_torch):
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == dtype
            largest = b.abs().max().item() if b.numel() else 0.0
            torch.testing.assert_close(a.double(), b, atol=tolerance * max(1.0, largest), rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gives_the_same_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(70 * 50, generator=generator)[:333].sort().values.int()
    values = torch.randn(333, 1, generator=generator).to(dtype)
    x = torch.randn(50, 100, generator=generator).to(dtype).T  # not contiguous
    functional = torch.randn(100, 70, generator=generator).to(dtype)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(everything(x, values, places, (70, 50), functional))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("places", [[3, 2], [4, 4], [-1, 5], [0, OUT * IN]])
def test_damaged_places_are_refused(places: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must ascend within 0 \.\. 767: the checkpoint is damaged"):
        EntryOrder.of(torch.tensor(places, dtype=torch.int32), (OUT, IN))


@pytest.mark.parametrize("width", [1, 64])
def test_rows_and_columns_without_entries_are_zero(width: int) -> None:
    places = torch.tensor([IN // width + 1], dtype=torch.int32)
    x = torch.ones(2, IN, requires_grad=True)
    y = product(x, torch.ones(1, width), places)
    y.sum().backward()
    assert y.detach().count_nonzero(0).tolist() == [0, 2, 0, 0, 0, 0]
    assert x.grad is not None
    assert x.grad.count_nonzero(1).tolist() == [width, width]
    assert x.grad[:, width : 2 * width].all()


@pytest.mark.parametrize("crowded", [False, True])
def test_blocks_in_groups_give_the_product_however_they_are_spread(crowded: bool) -> None:
    rows, columns, width = 40, 5, 8
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(rows * columns, generator=generator)[:60].sort().values.int()
    if crowded:  # one column with all its blocks, one with none, the others with some
        inside = places[places % columns > 1]
        places = torch.cat([inside, torch.arange(rows, dtype=torch.int32) * columns]).sort().values
    groups = BlockGroups.of(places, columns)
    assert (groups.columns is not None) == crowded
    assert len(groups.rows) <= 3 * len(places) + columns
    values = torch.randn(len(places), width, dtype=torch.float64, generator=generator, requires_grad=True)
    matrix = torch.zeros(rows * columns, width, dtype=torch.float64).index_add(0, places, values)
    x = torch.randn(3, 7, columns * width, dtype=torch.float64, generator=generator, requires_grad=True)
    found = block_linear(x, values, groups, scale=0.5, out_features=rows)
    expected = F.linear(x, 0.5 * matrix.view(rows, -1))
    torch.testing.assert_close(found, expected)
    functional = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    ours, theirs = (torch.autograd.grad((y * functional).sum(), [x, values]) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("width", [1, 64])
def test_results_have_a_row_for_each_token(width: int) -> None:
    # By columns, all that reads them, as far as the activations of the next layer, is some five times as slow.
    places, values = problem(width, 2, torch.float32)
    x = torch.randn(3, 5, IN, requires_grad=True)
    y = product(x, values, places)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.is_contiguous()
    assert grad.is_contiguous()


TALL = 64
"""Rows of a layer in which a few blocks are few enough entries for the sparse product."""


def sift(rate: float, entries: str = "entry") -> Sift:
    spec = LinearSpec(name="layer", out_features=TALL, in_features=IN)
    update = Sift(spec, rate=rate, choose="random", entries=entries)
    update.values.data.normal_(generator=torch.Generator().manual_seed(1))
    return update


@pytest.mark.parametrize("entries", ["entry", "block64"])
@pytest.mark.parametrize("rate", [0.02, 0.2])
def test_few_and_many_entries_give_the_merged_weight(rate: float, entries: str) -> None:
    update, w, x = sift(rate, entries), torch.randn(TALL, IN), torch.randn(7, IN)
    torch.testing.assert_close(update(x, lambda v: F.linear(v, w)), F.linear(x, update.merge(w)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rate", "entries"), [(0.02, "entry"), (0.2, "entry"), (0.02, "block64")])
@pytest.mark.parametrize("how", ["copy", "load_state_dict"])
def test_places_that_a_checkpoint_replaces_take_effect(how: str, rate: float, entries: str) -> None:
    update, w, x = sift(rate, entries), torch.randn(TALL, IN), torch.randn(7, IN, requires_grad=True)
    before = update(x, lambda v: F.linear(v, w))
    other = ((update.places + 1) % (TALL * IN // update.values.shape[1])).sort().values
    if how == "copy":
        update.places.copy_(other)
    else:
        update.load_state_dict({"places": other, "values": update.values.detach().clone()})
    after = update(x, lambda v: F.linear(v, w))
    merged = update.merge(w)
    torch.testing.assert_close(after, F.linear(x, merged), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(
        torch.autograd.grad(after.sum(), x)[0],
        torch.autograd.grad(F.linear(x, merged).sum(), x)[0],
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("entries", ["entry", "block64"])
def test_the_input_alone_is_kept_for_backward(entries: str) -> None:
    update, w, x = sift(0.02, entries), torch.randn(TALL, IN), torch.randn(7, IN, requires_grad=True)
    known = {t.data_ptr() for t in (x, w, *update.parameters(), *update.buffers())}
    kept: list[tuple[int, ...]] = []
    assert isinstance(update.values, nn.Parameter)

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        update(x, lambda v: v @ w.T)
    assert kept == []
