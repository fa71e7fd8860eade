"""A function of one input that several layers need: computed once, and never from another input or state."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor

from qaft.updates.shared_input import SharedInput


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * x


def group(members: int) -> SharedInput:
    shared = SharedInput()
    for _ in range(members - 1):
        assert shared.join() is shared
    return shared


@pytest.mark.parametrize("members", [1, 2, 3])
def test_each_input_is_computed_once_for_all_members(members: int) -> None:
    shared, compute = group(members), Counted()
    for number in range(4):
        x = torch.full((3,), float(number))
        for _ in range(members):
            assert torch.equal(shared(x, compute), 2 * x)
    assert compute.calls == 4


def test_another_tensor_of_the_same_values_is_computed_again() -> None:
    shared, compute, x = group(3), Counted(), torch.ones(3)
    shared(x, compute)
    shared(x.clone(), compute)
    assert compute.calls == 2


def test_what_was_changed_in_place_is_computed_again() -> None:
    shared, compute, x, parameter = group(4), Counted(), torch.ones(3), torch.ones(1)
    shared(x, compute, parameter)
    x.mul_(3)
    assert torch.equal(shared(x, compute, parameter), 2 * x)
    parameter.add_(1)
    shared(x, compute, parameter)
    assert compute.calls == 3


def test_what_has_no_graph_is_not_given_to_who_needs_one() -> None:
    shared, compute, x = group(3), Counted(), torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not shared(x, compute).requires_grad
    assert shared(x, compute).requires_grad
    with torch.inference_mode():
        shared(x, compute)
    assert compute.calls == 3


def test_gradients_of_all_members_are_added() -> None:
    shared, x = group(2), torch.ones(3, requires_grad=True)
    (shared(x, lambda v: 2 * v) + 3 * shared(x, lambda v: 2 * v)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((3,), 8.0))


def test_nothing_is_held_after_the_last_member_or_the_end_of_the_input() -> None:
    shared, compute, x = group(2), Counted(), torch.ones(3)
    shared(x, compute), shared(x, compute)
    assert shared._entry is None
    shared(x, compute)
    assert shared._entry is not None
    del x
    gc.collect()
    assert shared._entry is None


def test_a_copy_holds_nothing_and_has_as_many_members() -> None:
    shared, compute, x = group(2), Counted(), torch.ones(3, requires_grad=True)
    shared(x, compute)
    again = copy.deepcopy(shared)
    assert again._entry is None
    again(x, compute), again(x, compute)
    assert compute.calls == 2
