"""What every section is: a frozen type that refuses unknown keys."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

DTypeName = Literal["bfloat16", "float16", "float32"]


class Section(BaseModel):
    """A part of the recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KindSection(BaseModel):
    """``{kind: name, **options}``; the options are checked against the constructor of the registered class."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: str

    @property
    def options(self) -> dict[str, Any]:
        """Return everything but ``kind``."""
        return dict(self.__pydantic_extra__ or {})
