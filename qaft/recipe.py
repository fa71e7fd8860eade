"""The recipe file: reading, overriding and writing the sections of ``qaft.sections``; nothing here imports torch.

A recipe is YAML, read by the safe loader: configuration never executes code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from qaft.errors import RecipeError
from qaft.registry import suggest
from qaft.sections import (
    DataSection,
    ExportSection,
    KindSection,
    ModelSection,
    OptimSection,
    QatSection,
    Section,
    SelectSection,
    TrainSection,
    UpdateSection,
)


class Recipe(Section):
    """Everything that defines a run."""

    model: ModelSection
    select: SelectSection = Field(default_factory=SelectSection)
    update: UpdateSection = Field(default_factory=UpdateSection)
    qat: QatSection | None = None
    gradient: KindSection = Field(default_factory=lambda: KindSection(kind="backprop"))
    regularize: tuple[KindSection, ...] = ()
    optim: OptimSection = Field(default_factory=OptimSection)
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
    export: tuple[ExportSection, ...] = ()

    def dump(self) -> dict[str, Any]:
        """Return the resolved recipe as plain YAML-able values."""
        return self.model_dump(mode="json")


def _describe(error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        given = item.get("input")
        if item["type"] == "extra_forbidden":
            section: Any = Recipe
            for part in item["loc"][:-1]:
                field = getattr(section, "model_fields", {}).get(part)
                section = _section_class(field.annotation) if field else None
            allowed = sorted(getattr(section, "model_fields", {}))
            key = str(item["loc"][-1])
            lines.append(f"{path} is not a key: allowed here: {', '.join(allowed)}{suggest(key, allowed)}")
        elif item["type"] == "missing":
            lines.append(f"{path} is required")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{path}={given!r}: {message[0].lower()}{message[1:]}")
    return f"{source}: " + "; ".join(lines)


def _section_class(annotation: Any) -> Any:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split ``train.lr=1e-4`` or ``--train.lr=1e-4`` into a key path and a YAML value.

    Raises:
        RecipeError: there is no ``=``, or the value is not YAML.
    """
    key, separator, value = text.lstrip("-").partition("=")
    if not separator or not key:
        raise RecipeError(f"override {text!r} must look like section.key=value")
    try:
        parsed = yaml.safe_load(value) if value else None
    except yaml.YAMLError as error:
        raise RecipeError(f"override {text!r}: the value is not YAML: {error}") from error
    return key.split("."), _number(parsed)


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 (no dot) as a string; every user means the number.
    if isinstance(value, str):
        try:
            return float(value) if any(c in value for c in ".eE") and value[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return _number(value)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of ``raw`` with each ``a.b=v`` set; intermediate sections are created.

    Raises:
        RecipeError: an override is malformed or walks through a value that is no section.
    """
    result = json.loads(json.dumps(raw))
    for text in overrides:
        path, value = parse_override(text)
        node: Any = result
        for position, part in enumerate(path[:-1]):
            if isinstance(node, list):
                node = node[_index(part, node, text)]
                continue
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, (dict, list)):
                raise RecipeError(f"override {text!r}: {'.'.join(path[: position + 1])} is {node!r}, not a section")
        if isinstance(node, list):
            node[_index(path[-1], node, text)] = value
        else:
            node[path[-1]] = value
    return result


def _index(part: str, items: list[Any], text: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise RecipeError(f"override {text!r}: {part!r} must be an index below {len(items)}")
    return int(part)


def parse_recipe(raw: Any, *, source: str = "recipe") -> Recipe:
    """Validate plain values as a Recipe.

    Raises:
        RecipeError: unknown key, wrong type or impossible value; the message names each key path.
        IncompatibleError: two choices exclude each other.
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"{source}: must be a mapping with the sections {', '.join(Recipe.model_fields)}")
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_describe(error, source)) from error
    from qaft.compat import check_compatible

    check_compatible(recipe)
    return recipe


def recipe_path(path: str | Path) -> Path:
    """Return the recipe file for a path that is a recipe or a run folder.

    Raises:
        RecipeError: there is no such file, or the folder is no run folder.
    """
    path = Path(path)
    if path.is_dir():
        inner = path / RUN_RECIPE
        if not inner.is_file():
            raise RecipeError(f"{path}: not a run folder (no {RUN_RECIPE}); give a recipe file or a run folder")
        return inner
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe; give a YAML file or a run folder")
    return path


RUN_RECIPE = "qaft.yaml"
"""Name of the resolved recipe inside a run folder."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file (or the resolved recipe of a run folder) and apply ``key=value`` overrides.

    Raises:
        RecipeError: missing file, broken YAML, unknown key, wrong type or impossible value.
    """
    file = recipe_path(path)
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not valid YAML: {error}") from error
    return parse_recipe(apply_overrides(_numbers(raw or {}), overrides), source=str(file))


def save_recipe(recipe: Recipe, folder: Path) -> Path:
    """Write the resolved recipe into a run folder and return its path."""
    path = folder / RUN_RECIPE
    path.write_text(yaml.safe_dump(recipe.dump(), sort_keys=False), encoding="utf-8")
    return path
