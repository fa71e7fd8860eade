"""The selection pass chooses as the whole gradient would, in bounded memory, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qaft.bases.base import FrozenLinear
from qaft.bases.dense import DenseBase
from qaft.selection.gradients import largest_gradients
from qaft.updates.entries import EntryChoice

BATCHES = [torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
CHOICE = EntryChoice(rate=0.1, width=1, by="gradient")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(9)
        self.a = DenseBase(torch.randn(16, 8, generator=generator))
        self.b = DenseBase(torch.randn(8, 16, generator=generator))
        self.c = DenseBase(torch.randn(4, 8, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x + self.b(self.a(x).tanh())).square().sum()

    def layers(self) -> dict[str, FrozenLinear]:
        return {"a": self.a, "b": self.b, "c": self.c}


def whole_gradients(net: Net) -> dict[str, Tensor]:
    weights = {name: layer.weight.clone().requires_grad_() for name, layer in net.layers().items()}
    for x in BATCHES:
        hidden = (x @ weights["a"].T).tanh() @ weights["b"].T
        ((x + hidden) @ weights["c"].T).square().sum().backward()
    return {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize("held", [1, 200, 10_000])
@pytest.mark.parametrize("width", [1, 8])
def test_the_choice_is_that_of_the_whole_gradient_however_little_is_held(held: int, width: int) -> None:
    net, choice = Net(), EntryChoice(rate=0.1, width=width, by="gradient")
    passes = []

    def batches() -> list[Tensor]:
        passes.append(1)
        return BATCHES

    chosen = largest_gradients(net.layers(), choice, batches, net, held_entries=held)
    expected = {name: choice.largest(gradient) for name, gradient in whole_gradients(net).items()}
    assert chosen.keys() == expected.keys()
    assert all(torch.equal(chosen[name], expected[name]) for name in chosen)
    assert len(passes) == {1: 3, 200: 2, 10_000: 1}[held]


def test_nothing_stays_behind_in_the_model() -> None:
    net = Net()
    before = net(BATCHES[0])
    largest_gradients(net.layers(), CHOICE, lambda: BATCHES, net)
    assert not any(layer._forward_hooks for layer in net.layers().values())
    after = net(BATCHES[0])
    assert torch.equal(before, after)
    assert not after.requires_grad


def test_hooks_are_removed_when_a_batch_fails() -> None:
    net = Net()

    def fail(_: object) -> Tensor:
        net(BATCHES[0])
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        largest_gradients(net.layers(), CHOICE, lambda: BATCHES, fail)
    assert not any(layer._forward_hooks for layer in net.layers().values())


def test_a_layer_that_no_token_goes_through_is_chosen_from_all_the_same() -> None:
    net = Net()
    layers = {**net.layers(), "unused": DenseBase(torch.randn(5, 6))}
    chosen = largest_gradients(layers, CHOICE, lambda: BATCHES, net)
    assert len(chosen["unused"]) == CHOICE.count(30)
