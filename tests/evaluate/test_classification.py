"""Verbalizer accuracy: the argmax of summed log-probabilities, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from tiny_lm import Choice, tiny_llama

from qaft.errors import DataError
from qaft.evaluate.classification import verbalizer_accuracy


def score(prompt: tuple[int, ...], option: tuple[int, ...]) -> float:
    ids = torch.tensor([*prompt, *option])
    with torch.no_grad():
        log_probs = tiny_llama()(ids[None]).logits[0].double().log_softmax(-1)
    positions = range(len(prompt) - 1, len(ids) - 1)
    return sum(float(log_probs[p, ids[p + 1]]) for p in positions)


ITEMS = [
    Choice((5, 6, 7), ((1,), (2,), (3,)), 0),
    Choice((9,), ((1, 4), (2, 4, 5)), 1),
    Choice((40, 41, 42, 43, 44, 45), ((8,), (70, 71)), 0),
    Choice((5, 6), ((11, 12, 13), (11, 12, 14)), 1),
]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_prediction_is_the_most_likely_option(batch_size: int) -> None:
    found = verbalizer_accuracy(tiny_llama(), ITEMS, batch_size=batch_size)
    expected = []
    for item in ITEMS:
        scores = [score(item.prompt_ids, option) for option in item.option_ids]
        expected.append(scores.index(max(scores)))
    assert found.predictions == tuple(expected)
    assert found.correct == sum(p == item.label for p, item in zip(expected, ITEMS, strict=True))
    assert found.value == found.correct / 4


def test_the_losses_are_those_of_the_right_option_and_of_the_choice() -> None:
    found = verbalizer_accuracy(tiny_llama(), ITEMS)
    scores = [torch.tensor([score(item.prompt_ids, option) for option in item.option_ids]) for item in ITEMS]
    right = [float(of_options[item.label]) for of_options, item in zip(scores, ITEMS, strict=True)]
    sure = [float(of_options.log_softmax(0)[item.label]) for of_options, item in zip(scores, ITEMS, strict=True)]
    assert found.loss == pytest.approx(-sum(right) / 4, rel=1e-5)
    assert found.choice_loss == pytest.approx(-sum(sure) / 4, rel=1e-4)


def test_one_token_options_share_one_row() -> None:
    model, rows = tiny_llama(), []
    model.model.register_forward_hook(
        lambda module, inputs, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    verbalizer_accuracy(model, ITEMS[:1])
    assert rows[-1] == 1


def test_ties_go_to_the_first_option() -> None:
    assert verbalizer_accuracy(tiny_llama(), [Choice((1, 2), ((3,), (3,)), 1)]).predictions == (0,)


def test_empty_items_are_errors() -> None:
    with pytest.raises(DataError, match="no item"):
        verbalizer_accuracy(tiny_llama(), [])
    with pytest.raises(DataError, match="has no token"):
        verbalizer_accuracy(tiny_llama(), [Choice((), ((1,),), 0)])
    with pytest.raises(DataError, match="has no token"):
        verbalizer_accuracy(tiny_llama(), [Choice((1,), ((),), 0)])
