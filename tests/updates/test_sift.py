"""What is special to sparse entries: which they are, and that they train as the masked dense weight would."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qaft.bases.base import LinearSpec
from qaft.bases.dense import DenseBase
from qaft.quant.nf4 import NF4
from qaft.updates.entries import EntryChoice
from qaft.updates.sift import Sift

OUT, IN = 6, 128
W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))


def make(scores: torch.Tensor | None = None, **options) -> Sift:
    choice = Sift.entry_choice(**options)
    places = None if scores is None else choice.largest(scores)
    return Sift(LinearSpec(name="layer", out_features=OUT, in_features=IN, places=places), **options)


def random_scores(seed: int = 1) -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.5, 1.0])
def test_the_largest_entries_are_those_of_a_full_sort(rate: float) -> None:
    scores, choice = random_scores(), EntryChoice(rate=rate, width=1, by="gradient")
    expected = scores.abs().flatten().argsort(descending=True)[: choice.count(scores.numel())].sort().values
    assert torch.equal(choice.largest(scores), expected.int())
    assert choice.count(scores.numel()) == min(int(rate * OUT * IN) + 1, OUT * IN)


def test_the_largest_blocks_are_those_with_the_most_energy() -> None:
    scores, choice = random_scores(), EntryChoice(rate=0.3, width=64, by="gradient")
    energy = scores.square().view(-1, 64).sum(1)
    places = choice.largest(scores)
    assert len(places) == int(0.3 * OUT * IN / 64) + 1
    assert energy[places].min() > energy[[p for p in range(len(energy)) if p not in places.tolist()]].max()


def test_gradients_are_the_chosen_entries_of_the_full_gradient() -> None:
    update = make(random_scores(), rate=0.05)
    x, g = torch.randn(11, IN), torch.randn(11, OUT)
    (update(x, lambda v: F.linear(v, W)) * g).sum().backward()
    torch.testing.assert_close(update.values.grad.flatten(), (g.T @ x).flatten()[update.places])


@pytest.mark.parametrize(("entries", "rate"), [("entry", 0.05), ("block64", 0.4)])
def test_training_equals_masked_dense_adamw_step_for_step(entries: str, rate: float) -> None:
    update = make(random_scores(), rate=rate, entries=entries)
    base = DenseBase(W)
    mask = torch.zeros(OUT * IN // update.values.shape[1], update.values.shape[1])
    mask[update.places.long()] = 1
    mask = mask.view(OUT, IN)
    dense = torch.zeros(OUT, IN, requires_grad=True)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    sparse_adam, dense_adam = torch.optim.AdamW(update.parameters(), **options), torch.optim.AdamW([dense], **options)
    for step in range(5):
        x = torch.randn(16, IN, generator=torch.Generator().manual_seed(step))
        update(x, base.matmul).square().sum().backward()
        F.linear(x, W + dense).square().sum().backward()
        dense.grad *= mask
        for optimizer in (sparse_adam, dense_adam):
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(update.merge(W), W + dense, atol=2e-6, rtol=1e-5)
    assert int((dense != 0).sum()) == update.values.numel()


def test_the_gradient_is_of_the_current_values_and_the_last_step_is_merged() -> None:
    # The official code harvests gradients one step late and never writes its last increment into the weight.
    update = make(random_scores(), rate=0.05)
    update.values.data.normal_()
    x = torch.randn(4, IN)
    update(x, lambda v: F.linear(v, W)).square().sum().backward()
    full = torch.zeros(OUT, IN, requires_grad=True)
    F.linear(x, update.merge(W).detach() + full).square().sum().backward()
    torch.testing.assert_close(update.values.grad.flatten(), full.grad.flatten()[update.places], atol=1e-3, rtol=1e-4)


def test_blocks_leave_the_codes_of_all_other_blocks_of_a_4_bit_base() -> None:
    update = make(random_scores(), rate=0.3, entries="block64")
    update.values.data.normal_()
    grid = NF4(group_size=64)
    before, after = grid.quantize(W), grid.quantize(update.merge(W))
    changed = (before.dequantize(torch.float32) != after.dequantize(torch.float32)).view(-1, 64).any(1)
    assert torch.equal(changed.nonzero().flatten(), update.places.long())


def test_random_choice_repeats_with_its_seed_and_differs_between_layers() -> None:
    def places(name: str, seed: int) -> list[int]:
        spec = LinearSpec(name=name, out_features=OUT, in_features=IN, seed=seed)
        return Sift(spec, choose="random").places.tolist()

    assert places("a", 0) == places("a", 0)
    assert places("a", 0) != places("b", 0)
    assert places("a", 0) != places("a", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0}, r"rate=0 must be above 0 and at most 1"),
        ({"rate": 1.5}, r"rate=1\.5 must be"),
        ({"rate": "all"}, r"rate=all must be"),
        ({"entries": "row"}, r"entries='row' must be one of entry, block64"),
        ({"choose": "best"}, r"choose='best' must be one of gradient, magnitude, random"),
        ({}, r"choose='gradient' needs the entries of a selection pass"),
    ],
)
def test_impossible_options_name_the_layer_and_what_is_allowed(options, message: str) -> None:
    with pytest.raises(ValueError, match=f"layer: {message}"):
        Sift(LinearSpec(name="layer", out_features=OUT, in_features=IN), **options)


def test_blocks_that_do_not_divide_the_input_are_refused() -> None:
    spec = LinearSpec(name="layer", out_features=OUT, in_features=96)
    with pytest.raises(ValueError, match="layer: entries='block64' needs input features divisible by 64, not 96"):
        Sift(spec, entries="block64", choose="random")
