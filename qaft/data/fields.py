"""Checked access to the fields of a row: every failure is a DataError that names file, line and field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qaft.data.files import Provenance, Row
from qaft.errors import DataError


def required_field(row: Row, name: str) -> Any:
    """Return the value of a field that must be there and not be null."""
    value = row.fields.get(name)
    if value is None:
        raise DataError(
            f"{row.source}: no field {name!r}, found the fields {listed(row.fields)}; "
            "add it, or set data.columns or data.format"
        )
    return value


def turn_list(row: Row, name: str) -> list[Any]:
    """Return a field that must be a list with at least one entry."""
    value = required_field(row, name)
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.source}: {name}={shown(value)} must be a list of at least one turn")
    return value


def mapping(value: Any, source: Provenance, where: str) -> Mapping[str, Any]:
    """Return a value that must be an object; ``where`` names it in the message."""
    if not isinstance(value, Mapping):
        raise DataError(f"{source}: {where}={shown(value)} must be an object")
    return value


def choice(entry: Mapping[str, Any], key: str, allowed: Sequence[str], source: Provenance, where: str) -> str:
    """Return ``entry[key]``, which must be one of ``allowed``."""
    value = entry.get(key)
    if not isinstance(value, str) or value not in allowed:
        found = f"{key}={shown(value)}" if key in entry else f"no {key!r} (found {listed(entry)})"
        raise DataError(f"{source}: {where} has {found}; {key} must be one of {', '.join(allowed)}")
    return value


def message_content(entry: Mapping[str, Any], source: Provenance, where: str) -> str:
    """Return the text of a message: its content as a string, or the joined texts of its parts."""
    value = entry.get("content")
    if isinstance(value, list):  # the parts of a message that may also hold images
        parts = [mapping(part, source, f"{where}.content") for part in value]
        if any(part.get("type", "text") != "text" for part in parts):
            kinds = sorted({str(part.get("type")) for part in parts})
            raise DataError(f"{source}: {where}.content has parts of type {', '.join(kinds)}; only text is supported")
        value = "".join(string(part.get("text"), source, f"{where}.content") for part in parts)
    return string(value, source, f"{where}.content")


def string(value: Any, source: Provenance, field: str) -> str:
    """Return a value that must be a string that can be encoded as UTF-8."""
    if not isinstance(value, str):
        raise DataError(f"{source}: {field}={shown(value)} must be a string, found {type(value).__name__}")
    return encodable(value, source, field)


def encodable(value: str, source: Provenance, field: str) -> str:
    """Return the string, which must be free of lone surrogates."""
    # JSON can spell half of a surrogate pair ("\ud83d"); no tokenizer accepts it.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{source}: {field} holds half a surrogate pair at character {error.start + 1}, which is no text; repair it"
        ) from error
    return value


def listed(fields: Mapping[str, Any]) -> str:
    """Return the field names for a message."""
    return ", ".join(str(key) for key in fields) or "(none)"


def shown(value: Any) -> str:
    """Return the value for a message, at most 60 characters of it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
