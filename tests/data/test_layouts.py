from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qaft.data.examples import Completion, Conversation, Text, Turn
from qaft.data.files import Provenance
from qaft.data.layouts import Piece, choose_layout, pieces, prompt_and_answer
from qaft.errors import DataError, ModelError, RecipeError

WHERE = Provenance("a.jsonl", 7)


def talk(*contents: str, system: str | None = None) -> Conversation:
    roles = ("user", "assistant") * len(contents)
    turns = [Turn(role, content) for role, content in zip(roles, contents, strict=False)]
    return Conversation(tuple([Turn("system", system)] if system else []) + tuple(turns), WHERE)


def trained(sequence: list[Piece]) -> list[str]:
    return [piece.text for piece in sequence if piece.trained]


def test_every_assistant_turn_is_trained_with_its_end_and_nothing_else(chatml: Any) -> None:
    example = talk("q1", "a1", "q2", "a2", "q3", system="s")
    (sequence,) = pieces(example, choose_layout("auto", "messages", chatml))
    assert trained(sequence) == ["a1<|im_end|>\n", "a2<|im_end|>\n"]
    messages = [{"role": t.role, "content": t.content} for t in example.turns]
    assert "".join(piece.text for piece in sequence) == chatml.apply_chat_template(messages, tokenize=False)


def test_an_assistant_turn_with_weight_zero_stays_context(chatml: Any) -> None:
    turns = (Turn("user", "q"), Turn("assistant", "a", trained=False), Turn("user", "q"), Turn("assistant", "b"))
    (sequence,) = pieces(Conversation(turns, WHERE), choose_layout("auto", "messages", chatml))
    assert trained(sequence) == ["b<|im_end|>\n"]


def test_a_template_that_strips_white_space_trains_what_it_renders(make_tokenizer: Callable[..., Any]) -> None:
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (sequence,) = pieces(talk("  q ", "\n a \n"), choose_layout("auto", "messages", make_tokenizer(template)))
    assert sequence == [Piece("[user]q<|im_end|>[assistant]", False), Piece("a<|im_end|>", True)]


def test_a_template_that_rewrites_earlier_turns_gives_one_sequence_per_answer(
    make_tokenizer: Callable[..., Any],
) -> None:
    # Reasoning is kept in the last turn only, as in several reasoning models.
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}:"
        "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    layout = choose_layout("auto", "messages", make_tokenizer(template))
    sequences = pieces(talk("q1", "hm</think>a1", "q2", "so</think>a2"), layout)
    assert [trained(sequence) for sequence in sequences] == [["hm</think>a1<|im_end|>"], ["so</think>a2<|im_end|>"]]
    assert sequences[1][0].text == (
        "<|im_start|>user:q1<|im_end|><|im_start|>assistant:a1<|im_end|><|im_start|>user:q2<|im_end|><|im_start|>assistant:"
    )


def test_a_generation_prompt_that_training_would_not_see_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    with pytest.raises(DataError, match=r"line 7: the chat template ends a prompt with '<think>'.*turn 2"):
        pieces(talk("q", "a"), choose_layout("auto", "messages", make_tokenizer(template)))


def test_a_refusal_of_the_template_names_the_row(make_tokenizer: Callable[..., Any]) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"line 7: the chat template refuses.*roles must alternate"):
        pieces(talk("q", "a"), choose_layout("auto", "messages", make_tokenizer(template)))


def test_a_conversation_that_begins_with_the_assistant_is_refused(chatml: Any) -> None:
    example = Conversation((Turn("assistant", "hi"), Turn("user", "q"), Turn("assistant", "a")), WHERE)
    with pytest.raises(DataError, match="line 7: begins with an assistant turn"):
        pieces(example, choose_layout("auto", "messages", chatml))


def test_the_plain_layout_of_turns_is_the_documented_one(plain: Any) -> None:
    (sequence,) = pieces(talk("q", "a", "r", "b", system="s"), choose_layout("auto", "messages", plain))
    assert sequence == [
        Piece("### System:\ns\n\n### User:\nq\n\n### Assistant:\n", False),
        Piece("a<|im_end|>", True),
        Piece("\n\n### User:\nr\n\n### Assistant:\n", False),
        Piece("b<|im_end|>", True),
    ]


@pytest.mark.parametrize(
    ("mode", "name", "expected"),
    [
        ("auto", "prompt_completion", [Piece("<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n", False)]),
        ("plain", "prompt_completion", [Piece("p", False)]),
        ("auto", "classification", [Piece("p", False)]),
        ("tokenizer", "classification", [Piece("<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n", False)]),
    ],
)
def test_prompts_are_wrapped_by_the_template_as_the_recipe_says(
    chatml: Any, mode: str, name: str, expected: list[Piece]
) -> None:
    (sequence,) = pieces(Completion("p", "c", WHERE), choose_layout(mode, name, chatml))
    assert sequence[:1] == expected


def test_text_is_one_trained_piece_even_with_a_template(chatml: Any) -> None:
    assert pieces(Text("t", WHERE), choose_layout("auto", "text", chatml)) == [[Piece("t", True)]]


@pytest.mark.parametrize(
    ("mode", "name", "template", "eos", "error", "message"),
    [
        ("tokenizer", "messages", None, "<|im_end|>", ModelError, "has no chat template"),
        ("tokenizer", "text", "x", "<|im_end|>", RecipeError, "the format text has no turns"),
        ("plain", "messages", "x", None, ModelError, "has no EOS token"),
    ],
)
def test_a_layout_that_the_tokenizer_cannot_write_is_refused(
    make_tokenizer: Callable[..., Any], mode: str, name: str, template: Any, eos: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        choose_layout(mode, name, make_tokenizer(template, eos=eos))


@pytest.mark.parametrize(
    ("example", "mode", "expected"),
    [
        (Completion("p", " c", WHERE), "plain", ("p", " c")),
        (Completion("p", " c", WHERE), "tokenizer", ("<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n", " c")),
        (
            talk("q", "a", "r", "b", "later"),
            "plain",
            ("### User:\nq\n\n### Assistant:\na<|im_end|>\n\n### User:\nr\n\n### Assistant:\n", "b"),
        ),
    ],
)
def test_the_prompt_of_the_last_answer_is_what_generation_starts_from(
    chatml: Any, example: Any, mode: str, expected: tuple[str, str]
) -> None:
    assert prompt_and_answer(example, choose_layout(mode, "prompt_completion", chatml)) == expected


@pytest.mark.parametrize("example", [Text("t", WHERE), Conversation((Turn("user", "q"),), WHERE)])
def test_an_example_without_an_answer_has_nothing_to_compare(chatml: Any, example: Any) -> None:
    with pytest.raises(DataError, match="line 7: "):
        prompt_and_answer(example, choose_layout("auto", "messages", chatml))
