"""From a row to an Example: one parser per format, and the detection of the format from the fields of a row.

messages            {"messages": [{"role": "user", "content": "..."}, ...]}
sharegpt            {"conversations": [{"from": "human", "value": "..."}, ...]}, optional "system"
prompt_completion   {"prompt": "...", "completion": "..."}
instruction         {"instruction": "...", "output": "..."}, optional "input", "system"
text                {"text": "..."}
classification      any fields; data.classification says how they become a prompt and an option
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from string import Formatter

from qaft.data.examples import ROLES, Completion, Conversation, Example, Text, Turn
from qaft.data.fields import choice, encodable, listed, mapping, message_content, required_field, string, turn_list
from qaft.data.files import Row
from qaft.errors import DataError, RecipeError
from qaft.sections import ClassificationSection, DataSection, class_name

FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""Required fields by format, in the order of detection."""

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
}


def detect_format(row: Row) -> str:
    """Return the first format of FIELDS whose required fields the row holds.

    Raises:
        DataError: there is none; the message lists the fields found and those of each format.
    """
    for name, required in FIELDS.items():
        if all(row.fields.get(field) is not None for field in required):
            return name
    known = "; ".join(f"{name}: {', '.join(required)}" for name, required in FIELDS.items())
    raise DataError(
        f"{row.source}: no known format, found the fields {listed(row.fields)}; known are {known}; "
        "set data.columns to say which field is which, or data.classification for a labelled set"
    )


def choose_format(section: DataSection, first: Row) -> str:
    """Return the format of a data set: the one of the recipe, or for ``auto`` the one detected on its first row.

    Raises:
        RecipeError: the format and data.classification contradict each other.
        DataError: nothing is detected.
    """
    if section.format == "classification" and section.classification is None:
        raise RecipeError("data.format=classification needs data.classification with prompt, label and verbalizers")
    if section.classification is not None and section.format not in ("auto", "classification"):
        raise RecipeError(f"data.format={section.format}: data.classification is given too; drop one of the two")
    if section.classification is not None:
        return "classification"
    return detect_format(rename_fields(first, section.columns)) if section.format == "auto" else section.format


def rename_fields(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the row with each field ``columns[name]`` called ``name``.

    Raises:
        DataError: a field that ``columns`` names is missing.
    """
    if not columns:
        return row
    for name, field in columns.items():
        if field not in row.fields:
            raise DataError(
                f"{row.source}: no field {field!r} (data.columns.{name}); found the fields {listed(row.fields)}"
            )
    renamed = {k: v for k, v in row.fields.items() if k not in columns.values()}
    return Row(renamed | {name: row.fields[field] for name, field in columns.items()}, row.source)


def parse_row(row: Row, name: str, section: DataSection) -> Example:
    """Return the row as an Example of the format ``name``.

    Raises:
        DataError: a field is missing or has the wrong type; the message names file, line and field.
    """
    row = rename_fields(row, section.columns)
    if name == "classification":
        assert section.classification is not None  # choose_format refuses it
        return parse_classification(row, section.classification)
    return PARSERS[name](row)


def parse_classification(row: Row, section: ClassificationSection) -> Completion:
    """Return the prompt of the row and the text of its class.

    Raises:
        DataError: a field of the prompt or the label is missing, or the label has no verbalizer.
        RecipeError: the prompt is no format string over plain field names.
    """
    option = section.verbalizers[classification_label(row, section)]
    return Completion(_fill(section.prompt, row), option, row.source)


def classification_label(row: Row, section: ClassificationSection) -> str:
    """Return the class of the row, a key of the verbalizers.

    Raises:
        DataError: the label is missing or has no verbalizer.
    """
    label = class_name(required_field(row, section.label))
    if label not in section.verbalizers:
        allowed = ", ".join(section.verbalizers)
        raise DataError(
            f"{row.source}: {section.label}={label!r} has no verbalizer; must be one of {allowed}, "
            "or add it to data.classification.verbalizers"
        )
    return label


def _fill(prompt: str, row: Row) -> str:
    try:
        names = [name for _, name, _, _ in Formatter().parse(prompt) if name is not None]
    except ValueError as error:
        raise RecipeError(f"data.classification.prompt={prompt!r}: {error}; write {{{{ and }}}} for braces") from error
    if not all(name.isidentifier() for name in names):
        raise RecipeError(f"data.classification.prompt={prompt!r}: must hold plain field names such as {{sentence}}")
    for name in names:
        required_field(row, name)
    return encodable(prompt.format_map(row.fields), row.source, "prompt")


def _messages(row: Row) -> Conversation:
    if row.fields.get("tools"):
        raise DataError(f"{row.source}: the field 'tools' is not supported; write the tools into the system turn")
    turns = []
    for number, message in enumerate(turn_list(row, "messages"), start=1):
        where = f"messages[{number}]"
        entry = mapping(message, row.source, where)
        role = choice(entry, "role", ROLES, row.source, where)
        if entry.get("tool_calls"):
            raise DataError(f"{row.source}: {where} holds tool_calls, which are not supported; write them as content")
        weight = entry.get("weight")
        if weight not in (None, 0, 1):
            raise DataError(f"{row.source}: {where}.weight={weight!r}; must be 0 (not trained) or 1")
        turns.append(Turn(role, message_content(entry, row.source, where), weight != 0))
    return Conversation(tuple(turns), row.source)


def _sharegpt(row: Row) -> Conversation:
    turns = _system(row)
    for number, message in enumerate(turn_list(row, "conversations"), start=1):
        where = f"conversations[{number}]"
        entry = mapping(message, row.source, where)
        role = SHAREGPT_ROLES[choice(entry, "from", list(SHAREGPT_ROLES), row.source, where)]
        turns.append(Turn(role, string(entry.get("value"), row.source, f"{where}.value")))
    return Conversation(tuple(turns), row.source)


def _prompt_completion(row: Row) -> Completion:
    prompt, completion = (string(required_field(row, name), row.source, name) for name in FIELDS["prompt_completion"])
    return Completion(prompt, completion, row.source)


def _instruction(row: Row) -> Conversation:
    instruction, output = (string(required_field(row, name), row.source, name) for name in FIELDS["instruction"])
    extra = row.fields.get("input")
    asked = f"{instruction}\n\n{string(extra, row.source, 'input')}" if extra else instruction
    return Conversation((*_system(row), Turn("user", asked), Turn("assistant", output)), row.source)


def _text(row: Row) -> Text:
    return Text(string(required_field(row, "text"), row.source, "text"), row.source)


PARSERS: dict[str, Callable[[Row], Example]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "instruction": _instruction,
    "text": _text,
}
"""Parsers by format; ``classification`` needs its section and is parsed by parse_classification."""


def _system(row: Row) -> list[Turn]:
    system = row.fields.get("system")
    return [Turn("system", string(system, row.source, "system"))] if system else []
