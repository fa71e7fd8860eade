"""The sparse product against a dense one, and what is kept of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaft.bases.base import LinearSpec
from qaft.updates.block_product import BlockGroups, block_linear
from qaft.updates.entries import by_column
from qaft.updates.sift import Sift
from qaft.updates.sparse_product import sparse_linear

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
        return sparse_linear(x, values, places, by_column(places, columns), scale=scale, shape=(OUT, IN))
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
