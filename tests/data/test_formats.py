from __future__ import annotations

from typing import Any

import pytest

from qaft.data.examples import Completion, Conversation, Text, Turn
from qaft.data.files import Provenance, Row
from qaft.data.formats import choose_format, detect_format, parse_row
from qaft.errors import DataError, RecipeError
from qaft.recipe import parse_recipe
from qaft.sections import DataSection

WHERE = Provenance("a.jsonl", 7)
USER, GPT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
VERBALIZERS = {"prompt": "{sentence} It was", "verbalizers": {0: " bad", 1: " good"}}


def row(**fields: Any) -> Row:
    return Row(fields, WHERE)


def parse(name: str, **fields: Any) -> Any:
    return parse_row(row(**fields), name, DataSection())


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"messages": [USER, GPT], "text": "x"}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"prompt": "p", "completion": "c", "id": 1}, "prompt_completion"),
        ({"instruction": "i", "input": "", "output": "o"}, "instruction"),
        ({"text": "t", "prompt": None, "completion": None}, "text"),
    ],
)
def test_the_format_is_detected_from_the_fields(fields: dict[str, Any], name: str) -> None:
    assert detect_format(row(**fields)) == name


def test_an_unknown_format_lists_the_fields_found_and_those_of_each_format() -> None:
    with pytest.raises(DataError) as error:
        detect_format(row(question="q", answer="a"))
    message = str(error.value)
    assert message.startswith("a.jsonl, line 7: no known format, found the fields question, answer")
    assert "prompt_completion: prompt, completion" in message
    assert "data.columns" in message


def test_columns_rename_fields_before_detection_and_parsing() -> None:
    section = DataSection(columns={"prompt": "question", "completion": "answer"})
    given = row(question="q", answer="a", prompt="not this")
    assert choose_format(section, given) == "prompt_completion"
    assert parse_row(given, "prompt_completion", section) == Completion("q", "a", WHERE)


def test_a_column_that_is_missing_is_named() -> None:
    with pytest.raises(DataError, match=r"line 7: no field 'question' \(data.columns.prompt\)"):
        choose_format(DataSection(columns={"prompt": "question"}), row(text="t"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "classification"}, "needs data.classification"),
        ({"format": "text", "classification": VERBALIZERS}, "drop one of the two"),
    ],
)
def test_contradictions_between_format_and_classification_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        choose_format(DataSection(**settings), row(text="t"))


def test_messages_keep_their_turns_and_a_weight_of_zero_is_not_trained() -> None:
    example = parse("messages", messages=[{"role": "system", "content": "s"}, USER, {**GPT, "weight": 0}, USER, GPT])
    assert example == Conversation(
        (
            Turn("system", "s"),
            Turn("user", "q"),
            Turn("assistant", "a", trained=False),
            Turn("user", "q"),
            Turn("assistant", "a"),
        ),
        WHERE,
    )


def test_the_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse("messages", messages=[{"role": "user", "content": parts}]).turns == (Turn("user", "ab"),)


def test_sharegpt_roles_and_the_system_field_become_turns() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert parse("sharegpt", system="s", conversations=turns).turns == (
        Turn("system", "s"),
        Turn("user", "q"),
        Turn("assistant", "a"),
    )


@pytest.mark.parametrize(("extra", "asked"), [({}, "i"), ({"input": ""}, "i"), ({"input": "x"}, "i\n\nx")])
def test_an_instruction_is_asked_with_its_input(extra: dict[str, str], asked: str) -> None:
    assert parse("instruction", instruction="i", output="o", **extra).turns == (
        Turn("user", asked),
        Turn("assistant", "o"),
    )


def test_text_stays_as_it_is() -> None:
    assert parse("text", text=" a\r\n") == Text(" a\r\n", WHERE)


@pytest.mark.parametrize("label", [1, "1", 1.0])
def test_a_class_is_found_whether_the_label_is_a_number_or_a_string(label: Any) -> None:
    section = DataSection.model_validate({"classification": VERBALIZERS})
    given = row(sentence="{odd} one", label=label)
    assert parse_row(given, "classification", section) == Completion("{odd} one It was", " good", WHERE)


def test_boolean_labels_have_the_names_of_yaml_and_json() -> None:
    settings = {"prompt": "{q}?", "label": "answer", "verbalizers": {True: " yes", False: " no"}}
    section = DataSection.model_validate({"classification": settings})
    assert parse_row(row(q="a", answer=True), "classification", section) == Completion("a?", " yes", WHERE)


@pytest.mark.parametrize("verbalizers", [{"0": " bad"}, {"0": " bad", "1": " bad"}, {"0": "", "1": " good"}])
def test_verbalizers_need_two_texts_that_differ(verbalizers: dict[str, str]) -> None:
    settings = {**VERBALIZERS, "verbalizers": verbalizers}
    with pytest.raises(
        RecipeError, match=r"data\.classification\.verbalizers=.* at least two classes to texts that differ"
    ):
        parse_recipe({"model": {"name": "m"}, "data": {"classification": settings}})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, DataError, "line 7: label='2' has no verbalizer; must be one of 0, 1"),
        ({"prompt": "{premise}"}, DataError, "line 7: no field 'premise', found the fields sentence, label"),
        ({"prompt": "{sentence.__class__}"}, RecipeError, "plain field names"),
        ({"prompt": "{sentence"}, RecipeError, "braces"),
    ],
)
def test_a_classification_row_that_cannot_be_written_is_named(
    change: dict[str, str], error: type[Exception], message: str
) -> None:
    label = 2 if not change else 1
    section = DataSection.model_validate({"classification": {**VERBALIZERS, **change}})
    with pytest.raises(error, match=message):
        parse_row(row(sentence="s", label=label), "classification", section)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("text", {"txt": "a"}, "no field 'text', found the fields txt"),
        ("text", {"text": 3}, "text=3 must be a string, found int"),
        ("text", {"text": "a\ud83d"}, "text holds half a surrogate pair at character 2"),
        ("prompt_completion", {"prompt": "p", "completion": None}, "no field 'completion'"),
        ("instruction", {"instruction": "i", "output": ["o"]}, "output=.* must be a string, found list"),
        ("messages", {"messages": []}, "must be a list of at least one turn"),
        ("messages", {"messages": "hi"}, "must be a list"),
        ("messages", {"messages": ["hi"]}, r"messages\[1\]='hi' must be an object"),
        ("messages", {"messages": [USER, {"content": "a"}]}, r"messages\[2\] has no 'role' \(found content\)"),
        ("messages", {"messages": [{"role": "robot", "content": "a"}]}, "role='robot'; role must be one of system"),
        ("messages", {"messages": [{"role": "user"}]}, r"messages\[1\].content=None must be a string"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "type image; only text"),
        ("messages", {"messages": [{**GPT, "tool_calls": [{}]}]}, "tool_calls"),
        ("messages", {"messages": [USER, GPT], "tools": [{}]}, "'tools' is not supported"),
        ("messages", {"messages": [{**GPT, "weight": 0.5}]}, "weight=0.5; must be 0"),
        ("sharegpt", {"conversations": [USER]}, r"conversations\[1\] has no 'from' \(found role, content\)"),
        ("sharegpt", {"conversations": [{"from": ["human"], "value": "a"}]}, "from must be one of"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, r"conversations\[1\].value=None must be a string"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl, line 7: .*{message}"):
        parse(name, **fields)
