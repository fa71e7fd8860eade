"""What is known of a model family, as data: which linear reads which norm, and which writes the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "rms_plus_one"]
"""``rms``: x / rms(x) * weight.  ``rms_plus_one``: x / rms(x) * (1 + weight)."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Module names of a decoder family; a name with ``{i}`` exists once per decoder layer.

    Attributes:
        model_type: what the family's config calls itself.
        norm: how its norms use their weight.
        input_norm: read by query, key and value.
        post_norm: read by gate and up.
        untouched: parameters that no change of the residual basis or of the value heads concerns (full names).
    """

    model_type: str
    norm: NormKind
    embedding: str
    input_norm: str
    query: str
    key: str
    value: str
    output: str
    post_norm: str
    gate: str
    up: str
    down: str
    final_norm: str
    lm_head: str
    untouched: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Arch:
    """A family with the sizes of one model.

    Attributes:
        family: the module names.
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        head_dim: width of one attention head; need not be ``hidden_size / num_heads``.
        num_heads: query heads.
        num_kv_heads: key and value heads; each serves ``num_heads / num_kv_heads`` query heads in a row.
        tied: whether lm_head shares the embedding's weight.
    """

    family: Family
    num_layers: int
    hidden_size: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    tied: bool

    def names_of(self, template: str) -> tuple[str, ...]:
        """Return the module names that a template stands for, one per layer; without ``{i}`` it stands for itself."""
        if "{i}" not in template:
            return (template,)
        return tuple(template.format(i=i) for i in range(self.num_layers))

    def readers(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Return (norm, the linears that read it) for every norm of the residual stream, in the order of depth."""
        f = self.family
        templates = ((f.input_norm, (f.query, f.key, f.value)), (f.post_norm, (f.gate, f.up)))
        layers = [
            (norm.format(i=i), tuple(linear.format(i=i) for linear in linears))
            for i in range(self.num_layers)
            for norm, linears in templates
        ]
        return (*layers, (f.final_norm, (f.lm_head,)))

    def writers(self) -> tuple[str, ...]:
        """Return the linears that write the residual stream (the embedding writes it too)."""
        return (*self.names_of(self.family.output), *self.names_of(self.family.down))

    def value_outputs(self) -> tuple[tuple[str, str], ...]:
        """Return (value, output) per layer: the pair between which each head's basis is free."""
        return tuple(zip(self.names_of(self.family.value), self.names_of(self.family.output), strict=True))

    def untouched(self) -> frozenset[str]:
        """Return the full names of the parameters that no change of basis concerns."""
        return frozenset(name for template in self.family.untouched for name in self.names_of(template))

    def heads_of(self, name: str) -> int | None:
        """Return how many attention heads the rows of this linear belong to; None when it writes no heads."""
        if name in self.names_of(self.family.query):
            return self.num_heads
        if name in (*self.names_of(self.family.key), *self.names_of(self.family.value)):
            return self.num_kv_heads
        return None
