"""What every data format is turned into: a conversation, a prompt with its completion, or a text."""

from __future__ import annotations

from dataclasses import dataclass

from qaft.data.files import Provenance

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message.

    Attributes:
        role: one of ROLES.
        content: its text.
        trained: an assistant turn carries loss unless the data says otherwise (``weight: 0`` in the messages format).
    """

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; the assistant's are what is learned."""

    turns: tuple[Turn, ...]
    source: Provenance


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt that is given and the text that is learned after it, joined without any character between."""

    prompt: str
    completion: str
    source: Provenance


@dataclass(frozen=True, slots=True)
class Text:
    """A document that is learned as a whole."""

    text: str
    source: Provenance


Example = Conversation | Completion | Text
