"""Greedy generation: the argmax of the full forward at every step, whatever the batches and the padding."""

from __future__ import annotations

import pytest
import torch
from tiny_lm import LetterTokenizer, Task, tiny_llama

from qaft.bases.base import LinearSpec
from qaft.bases.dense import DenseBase
from qaft.errors import DataError
from qaft.evaluate.generation import exact_match, generate, stop_ids_of
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.attach import attach, replace_module
from qaft.quant.affine import Affine
from qaft.updates import LowRank

PROMPTS = [[5, 6, 7, 8, 9], [40], [3, 1], [60, 61, 62, 63, 64, 65, 66], [2, 2, 2]]


def slow(model: torch.nn.Module, prompt: list[int], steps: int, stop: frozenset[int] = frozenset()) -> list[int]:
    ids, answer = list(prompt), []
    with torch.no_grad():
        for _ in range(steps):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token in stop:
                break
            ids.append(token)
            answer.append(token)
    return answer


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_equal_those_without_cache_batch_and_padding(batch_size: int) -> None:
    model = tiny_llama()
    assert generate(model, PROMPTS, max_new_tokens=9, batch_size=batch_size) == [slow(model, p, 9) for p in PROMPTS]


def test_an_answer_ends_before_its_stop_token_and_others_go_on() -> None:
    model = tiny_llama()
    stop = frozenset({slow(model, PROMPTS[0], 4)[3]})
    found = generate(model, PROMPTS, max_new_tokens=9, stop_ids=stop)
    assert found == [slow(model, p, 9, stop) for p in PROMPTS]
    assert len(found[0]) < 9


def test_a_live_adapted_model_generates_through_its_grid() -> None:
    model = tiny_llama()
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    for name in names:
        replace_module(model, name, DenseBase(model.get_submodule(name).weight))  # type: ignore[arg-type]
    spec = {n: LinearSpec(name=n, out_features=32, in_features=32) for n in names}
    attach(
        model,
        names,
        lambda n, base: AdaptedLinear(base, LowRank(spec[n], rank=2), quantizer=Affine(bits=3, group_size=16)),
    )
    assert generate(model, PROMPTS, max_new_tokens=6) == [slow(model, p, 6) for p in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=6) != generate(tiny_llama(), PROMPTS, max_new_tokens=6)


def test_generation_settings_of_the_checkpoint_do_not_change_greedy_answers() -> None:
    model = tiny_llama()
    model.generation_config.repetition_penalty = 5.0
    assert generate(model, PROMPTS[:1], max_new_tokens=9) == [slow(model, PROMPTS[0], 9)]


def test_exact_match_ignores_surrounding_white_space() -> None:
    model, tokenizer = tiny_llama(), LetterTokenizer()
    texts = [tokenizer.decode(slow(model, p, 5), skip_special_tokens=True) for p in PROMPTS[:3]]
    items = [
        Task(tuple(PROMPTS[0]), f"  {texts[0]}\n"),
        Task(tuple(PROMPTS[1]), texts[1]),
        Task(tuple(PROMPTS[2]), "no"),
    ]
    found = exact_match(model, tokenizer, items, max_new_tokens=5)
    assert (found.correct, found.total, found.predictions) == (2, 3, tuple(texts))


def test_stop_tokens_come_from_tokenizer_and_generation_config() -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = [7, 8]
    assert stop_ids_of(model, LetterTokenizer()) == {7, 8, 95}
    model.generation_config.eos_token_id = None
    assert stop_ids_of(model, LetterTokenizer()) == {95}


def test_empty_prompts_and_sets_are_errors() -> None:
    with pytest.raises(DataError, match="prompt has no token"):
        generate(tiny_llama(), [[1], []], max_new_tokens=2)
    with pytest.raises(DataError, match="no item"):
        exact_match(tiny_llama(), LetterTokenizer(), [])
