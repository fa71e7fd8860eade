from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qaft.data.encode import TextEncoder
from qaft.data.layouts import Piece


def test_pieces_that_meet_between_tokens_are_tokenized_as_one_text(chatml: Any) -> None:
    (item,) = TextEncoder(chatml).encode([[Piece("It was", False), Piece(" good", True)]], add_begin=False)
    assert item.ids.tolist() == chatml("It was good")["input_ids"]
    assert [chatml.decode([i]) for i in item.ids[item.trained]] == [" g", "o", "o", "d"]
    assert not item.separate


@pytest.mark.parametrize(("prompt", "answer"), [("It was ", "good"), ("a\n", "\n\nb")])
def test_a_prompt_that_ends_inside_a_token_keeps_the_ids_that_generation_starts_from(
    chatml: Any, prompt: str, answer: str
) -> None:
    (item,) = TextEncoder(chatml).encode([[Piece(prompt, False), Piece(answer, True)]], add_begin=False)
    assert item.ids[~item.trained].tolist() == chatml(prompt)["input_ids"]
    assert chatml.decode(item.ids) == prompt + answer
    assert item.ids.tolist() != chatml(prompt + answer)["input_ids"]
    assert item.separate


def test_a_separate_piece_gets_no_space_that_nobody_wrote(stories260k: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    encoder = TextEncoder(tokenizer)
    (item,) = encoder.encode([[Piece("It was ", False), Piece("great", True)]], add_begin=True)
    assert item.separate
    assert tokenizer.decode(item.ids) == tokenizer.decode(tokenizer("It was great")["input_ids"])


@pytest.mark.parametrize("text", ["abc", "<s>abc"])
def test_bos_is_there_exactly_once(make_tokenizer: Callable[..., Any], text: str) -> None:
    tokenizer = make_tokenizer(None, bos=True)
    (item,) = TextEncoder(tokenizer).encode([[Piece(text, True)]], add_begin=True)
    assert item.ids.tolist() == tokenizer("abc")["input_ids"]
    assert item.ids.tolist().count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_without_bos_gets_none(chatml: Any) -> None:
    (item,) = TextEncoder(chatml).encode([[Piece("abc", True)]], add_begin=True)
    assert item.ids.tolist() == chatml("abc")["input_ids"]


def test_unicode_survives(chatml: Any) -> None:
    text = "naïve 漢字 😀\u2028\r\n"
    (item,) = TextEncoder(chatml).encode([[Piece("é", False), Piece(text, True)]], add_begin=False)
    assert chatml.decode(item.ids[item.trained]) == text


@pytest.mark.parametrize(
    ("text", "expected"), [("a<|im_end|>", 1), ("a<|im_end|>\n ", 1), ("<|im_end|>a", None), ("a", None), ("\n", None)]
)
def test_the_end_token_may_be_followed_by_white_space_only(chatml: Any, text: str, expected: int | None) -> None:
    encoder = TextEncoder(chatml)
    assert encoder.end_position(encoder.tokens([text])[0]) == expected


def test_bos_and_unknown_do_not_end_an_answer(stories260k: Path) -> None:
    encoder = TextEncoder(AutoTokenizer.from_pretrained(stories260k))
    assert encoder.begin_ids == [1]
    assert encoder.end_ids == {2}
