"""``{kind: name, **options}`` -> object; the constructor is the schema, so an option is declared once."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from qaft.errors import RecipeError

T = TypeVar("T")


def suggest(name: str, allowed: Mapping[str, Any] | list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest allowed name, or an empty string when none is near."""
    near = difflib.get_close_matches(str(name), [str(key) for key in allowed], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def lookup(registry: Mapping[str, type[T]], kind: str, *, where: str) -> type[T]:
    """Return the class registered as ``kind``.

    Args:
        registry: name -> class.
        kind: the name that the user gave.
        where: the key path of the recipe, for the message.

    Raises:
        RecipeError: the name is not registered; the message lists those that are.
    """
    if kind not in registry:
        raise RecipeError(
            f"{where}.kind={kind!r} is not known: must be one of {', '.join(sorted(registry))}{suggest(kind, registry)}"
        )
    return registry[kind]


def options_of(cls: type) -> dict[str, inspect.Parameter]:
    """Return the keyword-only constructor parameters of ``cls``: these are the options a recipe may set."""
    signature = inspect.signature(cls.__init__)
    return {n: p for n, p in signature.parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(cls: type, options: Mapping[str, Any], *, where: str) -> None:
    """Refuse option names that ``cls`` does not take.

    Raises:
        RecipeError: an option is unknown; the message lists the constructor's options with their defaults.
    """
    allowed = options_of(cls)
    for name in options:
        if name not in allowed:
            listing = ", ".join(
                n if p.default is inspect.Parameter.empty else f"{n}={p.default!r}" for n, p in allowed.items()
            )
            raise RecipeError(
                f"{where}.{name} is not an option of {cls.__name__}: it takes {listing or 'no options'}"
                f"{suggest(name, dict(allowed))}"
            )


def build_from(registry: Mapping[str, type[T]], kind: str, options: Mapping[str, Any], *args: Any, where: str) -> T:
    """Construct the object that ``{kind, **options}`` describes.

    Args:
        registry: name -> class.
        kind: the registered name.
        options: keyword-only constructor arguments from the recipe.
        *args: positional arguments that the program supplies (a layer's ``LinearSpec``, say).
        where: the key path of the recipe, for messages.

    Raises:
        RecipeError: unknown kind, unknown option, or a value that the constructor refuses.
    """
    cls = lookup(registry, kind, where=where)
    check_options(cls, options, where=where)
    try:
        return cls(*args, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}") from error


def schema_of(cls: type) -> dict[str, dict[str, str]]:
    """Return ``{option: {"type": ..., "default": ...}}`` of a registered class, for ``qaft list``."""
    rows: dict[str, dict[str, str]] = {}
    for name, parameter in options_of(cls).items():
        default = "required" if parameter.default is inspect.Parameter.empty else repr(parameter.default)
        annotation = parameter.annotation
        rows[name] = {"type": annotation if isinstance(annotation, str) else str(annotation), "default": default}
    return rows
