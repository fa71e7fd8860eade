"""What is remembered of a sample, when, and how it is found again."""

from __future__ import annotations

import torch
from torch import Tensor

from qaft.regularizers.memory import TargetMemory

IDS = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 0]])
LABELS = torch.tensor([[-100, -100, 7, 8], [-100, -100, 3, -100]])


def states(value: float) -> Tensor:
    return torch.arange(6.0).view(3, 2) + value


def test_a_step_finds_what_earlier_steps_left_and_not_what_it_leaves_itself() -> None:
    memory = TargetMemory()
    for _ in range(2):
        before, known = memory.exchange(IDS, LABELS, states(1), step=4)
        assert not known.any()
        assert not before.any()
    before, known = memory.exchange(IDS, LABELS, states(2), step=5)
    assert known.all()
    assert torch.equal(before, states(1))


def test_samples_are_found_in_other_rows_and_under_other_padding() -> None:
    memory = TargetMemory()
    memory.exchange(IDS, LABELS, states(1), step=0)
    longer = torch.tensor([[1, 2, 3, 9, 9], [4, 4, 4, 4, 4]])
    labels = torch.tensor([[-100, -100, 3, -100, -100], [-100, 4, -100, -100, -100]])
    before, known = memory.exchange(longer, labels, torch.ones(2, 2), step=1)
    assert known.tolist() == [True, False]
    assert torch.equal(before[0], states(1)[2])


def test_equal_tokens_with_other_targets_are_another_sample() -> None:
    memory = TargetMemory()
    memory.exchange(IDS[:1], LABELS[:1], states(1)[:2], step=0)
    other = torch.tensor([[-100, 6, 7, 8]])
    assert not memory.exchange(IDS[:1], other, states(1), step=1)[1].any()


def test_a_row_without_targets_is_passed_over() -> None:
    memory, labels = TargetMemory(), LABELS.clone()
    labels[0] = -100
    for step, expected in ((0, [False]), (1, [True])):
        assert memory.exchange(IDS, labels, states(0)[:1], step=step)[1].tolist() == expected


def test_the_state_of_a_step_under_way_is_that_of_its_beginning() -> None:
    memory, restored = TargetMemory(), TargetMemory()
    memory.exchange(IDS, LABELS, states(1), step=0)
    memory.exchange(IDS[:1], LABELS[:1], states(2)[:2], step=1)
    restored.load_state_dict(memory.state_dict(step=1))
    for copy in (memory, restored):
        before, known = copy.exchange(IDS, LABELS, states(3), step=1)
        assert known.all()
        assert torch.equal(before, states(1))


def test_the_state_after_a_step_holds_what_the_step_left() -> None:
    memory, restored = TargetMemory(), TargetMemory()
    restored.load_state_dict(memory.state_dict(step=0))
    memory.exchange(IDS, LABELS, states(1), step=0)
    restored.load_state_dict(memory.state_dict(step=1))
    assert torch.equal(restored.exchange(IDS, LABELS, states(2), step=1)[0], states(1))
