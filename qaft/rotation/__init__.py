"""Rotations, by the name a recipe uses: adding one is one file and one line here."""

from __future__ import annotations

from qaft.errors import RecipeError
from qaft.registry import suggest
from qaft.rotation.base import Rotation
from qaft.rotation.hadamard import Hadamard

ROTATIONS: dict[str, type[Rotation] | None] = {
    "hadamard": Hadamard,
    "none": None,
}

ADAPTIVE = "adaptive"
"""The recipe's word for choosing, place by place, between ``hadamard`` and no rotation."""


def rotation_kind(name: str) -> str:
    """Return the key of ``ROTATIONS`` that a recipe's ``qat.rotation`` is made of."""
    return "hadamard" if name == ADAPTIVE else name


def build_rotation(kind: str, size: int, *, seed: int | None = None) -> Rotation | None:
    """Return the rotation over ``size`` elements that a recipe calls ``kind``, or None for ``none``.

    Args:
        kind: a key of ``ROTATIONS``.
        size: width of the rotated axis.
        seed: of the rotation's random choices; None for the deterministic one.

    Raises:
        RecipeError: ``kind`` is not registered; the message lists those that are.
        ModelError: the rotation does not exist for this width.
    """
    if kind not in ROTATIONS:
        raise RecipeError(
            f"qat.rotation={kind!r} is not known: must be one of "
            f"{', '.join(sorted([ADAPTIVE, *ROTATIONS]))}{suggest(kind, [ADAPTIVE, *ROTATIONS])}"
        )
    cls = ROTATIONS[kind]
    return None if cls is None else cls(size, seed=seed)
