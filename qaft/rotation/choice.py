"""Which of a model's rotations are in use.

R1  residual    [hidden, hidden]       the residual stream, fused into every weight that reads or writes it
R2  values      [head_dim, head_dim]   the value heads of a layer, fused into value and output
R3  attention   [head_dim, head_dim]   queries and keys of a layer after the positions, online
R4  down        [block, block]         the input of down in a layer, online; its signs and its inverse are fused
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from qaft.arch.base import Arch
from qaft.errors import ModelError, RecipeError

MIN_BLOCK = 4
"""Smallest block of R4: below it a Hadamard matrix spreads nothing."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """True where a rotation is in use.

    Attributes:
        residual: R1.
        values: R2 of each layer.
        attention: R3 of each layer.
        down: R4 of each layer.
    """

    residual: bool
    values: tuple[bool, ...]
    attention: tuple[bool, ...]
    down: tuple[bool, ...]

    @classmethod
    def uniform(
        cls, num_layers: int, *, residual: bool, values: bool, attention: bool = False, down: bool = False
    ) -> Choice:
        """Return the choice that is the same in every layer."""
        return cls(
            residual=residual,
            values=(values,) * num_layers,
            attention=(attention,) * num_layers,
            down=(down,) * num_layers,
        )

    @classmethod
    def of_layers(
        cls,
        num_layers: int,
        *,
        residual: bool,
        values: Collection[int] = (),
        attention: Collection[int] = (),
        down: Collection[int] = (),
    ) -> Choice:
        """Return the choice that uses a rotation in the listed layers.

        Raises:
            RecipeError: there is no such layer.
        """
        for name, layers in (("values", values), ("attention", attention), ("down", down)):
            if wrong := [i for i in layers if not 0 <= i < num_layers]:
                raise RecipeError(f"qat.rotated.{name}: {wrong[0]} must be a layer, 0 to {num_layers - 1}")
        return cls(
            residual=residual,
            values=tuple(i in values for i in range(num_layers)),
            attention=tuple(i in attention for i in range(num_layers)),
            down=tuple(i in down for i in range(num_layers)),
        )

    def layers(self) -> dict[str, Any]:
        """Return the arguments of ``of_layers``, JSON-able."""
        listed = {"values": self.values, "attention": self.attention, "down": self.down}
        return {"residual": self.residual} | {
            name: [i for i, used in enumerate(flags) if used] for name, flags in listed.items()
        }

    @property
    def online(self) -> bool:
        """Return whether the model has to rotate anything while it runs."""
        return any(self.attention) or any(self.down)

    def __bool__(self) -> bool:
        """Return whether there is any rotation."""
        return self.residual or any(self.values) or self.online


def down_block(arch: Arch) -> int:
    """Return the width of R4's blocks: the largest power of two that divides the width of the MLP.

    Raises:
        ModelError: it is below ``MIN_BLOCK``.
    """
    width = arch.intermediate_size
    block = width & -width
    if block < MIN_BLOCK:
        raise ModelError(
            f"intermediate_size={width}: the largest power of two that divides it is {block}, too small for a rotation "
            "of down's input; set qat.target to portable, which has none"
        )
    return block
