"""Nested state as JSON plus named tensors: what a checkpoint needs instead of pickle.

Tensors move into a flat mapping and leave a reference behind; tuples, and dictionaries with keys that are not strings,
are tagged, so that ``decode(encode(x)) == x`` with the same types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"
_TAGS = frozenset({_TENSOR, _TUPLE, _ITEMS})


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as JSON values; its tensors are added to ``tensors`` under keys that start with ``path``.

    One tensor met twice (bitsandbytes shares its code book between parameters) is stored once.

    Args:
        value: dictionaries, lists, tuples, tensors, strings, numbers, booleans and None.
        path: dotted place of ``value``.
        tensors: filled in place.

    Raises:
        TypeError: something else; the message names its place.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return {_TENSOR: _store(value, path, tensors)}
    if isinstance(value, tuple):
        return {_TUPLE: [encode(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [encode(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        encoded = [(key, encode(item, f"{path}.{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and key not in _TAGS for key in value):
            return dict(encoded)
        return {_ITEMS: [[encode(key, f"{path}.key", tensors), item] for key, item in encoded]}
    raise TypeError(f"{path}: {type(value).__name__} cannot be stored; use numbers, strings, lists, dicts or tensors")


def _store(value: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    for key, stored in tensors.items():
        if stored is value:
            return key
    tensors[path] = value
    return path


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what ``encode`` was given; ``tensors`` holds the tensors by key.

    Raises:
        KeyError: a referenced tensor is missing.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(decode(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {decode(key, tensors): decode(item, tensors) for key, item in value[_ITEMS]}
    return {key: decode(item, tensors) for key, item in value.items()}
