"""Training and validation data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from qaft.sections.base import Section


class ClassificationSection(Section):
    """A classification set as text: the options are scored as completions of one prompt."""

    prompt: str = Field(description="format string over the row's fields, e.g. '{sentence} It was'")
    label: str = Field(default="label", description="field that holds the class")
    verbalizers: dict[str, str] = Field(description="class -> the text to be generated")
    loss: Literal["answer", "options"] = Field(
        default="answer",
        description="what a row teaches; answer: the tokens of the right text; options: to prefer it to the other "
        "texts, which are scored together after one prompt (needs packing: false)",
    )

    @field_validator("verbalizers", mode="before")
    @classmethod
    def _classes_may_be_written_as_numbers(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {class_name(k): v for k, v in value.items()}
        return value

    @field_validator("verbalizers")
    @classmethod
    def _options_differ(cls, value: dict[str, str]) -> dict[str, str]:
        if len(value) < 2 or len(set(value.values())) < len(value) or "" in value.values():
            raise ValueError("must map at least two classes to texts that differ and are not empty")
        return value


def class_name(value: Any) -> str:
    """Return the name of a class as verbalizers spell it: ``1``, ``1.0`` -> "1"; ``True`` -> "true"; "a" -> "a"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


class DataSection(Section):
    """Training and validation data."""

    train: str | None = Field(default=None, description="file (.jsonl .json .csv .parquet), hub id, or id:config")
    valid: str | None = None
    format: Literal["auto", "messages", "prompt_completion", "instruction", "sharegpt", "text", "classification"] = (
        "auto"
    )
    max_length: int = Field(default=1024, ge=8, description="tokens per sequence")
    packing: bool = Field(default=True, description="several samples in one row, without attention between them")
    chat_template: Literal["auto", "tokenizer", "plain"] = Field(
        default="auto",
        description="tokenizer: its chat template; plain: none; auto: the template when the tokenizer has one, but "
        "never for text and classification, whose rows are already the whole layout",
    )
    train_on: Literal["completion", "all"] = Field(default="completion", description="which tokens carry loss")
    train_split: str = "train"
    valid_split: str = "validation"
    limit: int | None = Field(default=None, ge=1, description="use only the first rows")
    columns: dict[str, str] = Field(
        default_factory=dict, description="field the format expects -> field of the file, e.g. {prompt: question}"
    )
    on_long: Literal["truncate", "split", "drop", "error"] = Field(
        default="truncate", description="samples above max_length; split: consecutive windows (format text only)"
    )
    classification: ClassificationSection | None = None

    @property
    def scores_options(self) -> bool:
        """Return whether rows are choices between options instead of texts to learn."""
        return self.classification is not None and self.classification.loss == "options"
