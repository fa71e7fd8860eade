"""What is known of a model family, as data: which linear reads which norm, and which writes the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

NormKind = Literal["rms", "rms_plus_one", "layer"]
"""``rms``: x / rms(x) * weight.  ``rms_plus_one``: x / rms(x) * (1 + weight).
``layer``: (x - mean(x)) / std(x) * weight + bias."""

HeadRows = Literal["separate", "stacked", "per_head"]
"""How the rows of query, key and value are held. ``separate``: three linears. ``stacked``: one linear, all queries,
then all keys, then all values. ``per_head``: one linear, head after head, each with its query, key and value."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Module names of a decoder family; a name with ``{i}`` exists once per decoder layer.

    Attributes:
        model_type: what the family's config calls itself.
        norm: how its norms use their parameters.
        embedding: the tokens, which start the residual stream.
        positions: learned positions that are added to it, or None.
        attention: the module that calls the attention function.
        input_norm: read by query, key and value.
        head_rows: how query, key and value share linears; where they do, their names are equal.
        post_norm: read by gate and up; None when they read ``input_norm`` too.
        gate: None for an MLP without gate; equal to ``up`` when one linear holds the gate's rows, then the up's.
        output_norms: norms of what a block has computed, before it is added to the residual stream.
        unbiased: linear that reads a norm -> the config's switch of its bias, or None when it never has one. Matters
            for norms with a bias only.
        residual_needs: config key -> the value without which the stream is not a plain sum of what the blocks write.
        untouched: parameters that no change of the residual basis or of the value heads concerns (full names).
    """

    model_type: str
    norm: NormKind
    embedding: str
    positions: str | None = None
    attention: str
    input_norm: str
    query: str
    key: str
    value: str
    head_rows: HeadRows = "separate"
    output: str
    post_norm: str | None
    gate: str | None
    up: str
    down: str
    output_norms: tuple[str, ...] = ()
    final_norm: str
    lm_head: str
    unbiased: Mapping[str, str | None] = field(default_factory=lambda: MappingProxyType({}))
    residual_needs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    untouched: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Arch:
    """A family with the sizes of one model.

    Attributes:
        family: the module names.
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP, which down reads.
        head_dim: width of one attention head; need not be ``hidden_size / num_heads``.
        num_heads: query heads.
        num_kv_heads: key and value heads; each serves ``num_heads / num_kv_heads`` query heads in a row.
        tied: whether lm_head shares the embedding's weight.
        unbiased: templates of readers that have no bias in this model.
        residual_obstacle: why the residual stream cannot be rotated, or None when it can.
    """

    family: Family
    num_layers: int
    hidden_size: int
    intermediate_size: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    tied: bool
    unbiased: frozenset[str] = frozenset()
    residual_obstacle: str | None = None

    def names_of(self, template: str) -> tuple[str, ...]:
        """Return the module names that a template stands for, one per layer; without ``{i}`` it stands for itself."""
        if "{i}" not in template:
            return (template,)
        return tuple(template.format(i=i) for i in range(self.num_layers))

    def readers(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Return (norm, the linears that read it) for every norm of the residual stream, in the order of depth."""
        templates = self._reader_templates()
        layers = [
            (norm.format(i=i), tuple(linear.format(i=i) for linear in linears))
            for i in range(self.num_layers)
            for norm, linears in templates.items()
        ]
        return (*layers, (self.family.final_norm, (self.family.lm_head,)))

    def shift_stays(self, norm: str) -> bool:
        """Return whether the bias of this norm has to stay in it, because not all of its readers can take it up."""
        readers = {**self._reader_templates(), self.family.final_norm: (self.family.lm_head,)}
        return any(
            linear in self.unbiased
            for template, linears in readers.items()
            if norm in self.names_of(template)
            for linear in linears
        )

    def sources(self) -> tuple[str, ...]:
        """Return the embeddings whose sum starts the residual stream."""
        return tuple(name for name in (self.family.embedding, self.family.positions) if name is not None)

    def writers(self) -> tuple[str, ...]:
        """Return the linears that write the residual stream (the embeddings write it too)."""
        return (*self.names_of(self.family.output), *self.names_of(self.family.down))

    def layers(self) -> tuple[str, ...]:
        """Return the modules of the decoder layers."""
        return self.names_of(self.family.input_norm.partition("{i}")[0] + "{i}")

    def attentions(self) -> tuple[str, ...]:
        """Return the module of each layer that calls the attention function."""
        return self.names_of(self.family.attention)

    def value_outputs(self) -> tuple[tuple[str, str], ...]:
        """Return (value, output) per layer: the pair between which each head's basis is free."""
        return tuple(zip(self.names_of(self.family.value), self.names_of(self.family.output), strict=True))

    def up_downs(self) -> tuple[tuple[str, str], ...]:
        """Return (up, down) per layer."""
        return tuple(zip(self.names_of(self.family.up), self.names_of(self.family.down), strict=True))

    def value_heads(self) -> tuple[int, range]:
        """Return how many heads the rows of the linear ``value`` hold, and which of them are value heads."""
        heads, kv = self.num_heads, self.num_kv_heads
        if self.family.head_rows == "per_head":
            return 3 * heads, range(2, 3 * heads, 3)
        if self.family.head_rows == "stacked":
            return heads + 2 * kv, range(heads + kv, heads + 2 * kv)
        return kv, range(kv)

    def up_rows(self) -> tuple[int, range]:
        """Return how many rows the linear ``up`` has, and which of them are multiplied by the activated gate.

        Without a gate there are none: what stands between up and down is not linear.
        """
        width, family = self.intermediate_size, self.family
        if family.gate is None:
            return width, range(0)
        return (2 * width, range(width, 2 * width)) if family.gate == family.up else (width, range(width))

    def untouched(self) -> frozenset[str]:
        """Return the full names of the parameters that no change of basis concerns."""
        return frozenset(name for template in self.family.untouched for name in self.names_of(template))

    def heads_of(self, name: str) -> int | None:
        """Return how many attention heads the rows of this linear belong to; None when it writes no heads."""
        family = self.family
        if name in self.names_of(family.value):
            return self.value_heads()[0]
        if name in self.names_of(family.query):
            return self.num_heads
        return self.num_kv_heads if name in self.names_of(family.key) else None

    def _reader_templates(self) -> dict[str, tuple[str, ...]]:
        """Return norm -> the linears that read it, each once, for one layer."""
        f = self.family
        mlp = (f.up,) if f.gate is None else (f.gate, f.up)
        readers = {f.input_norm: (f.query, f.key, f.value)}
        readers |= {f.post_norm: mlp} if f.post_norm else {f.input_norm: (*readers[f.input_norm], *mlp)}
        return {norm: tuple(dict.fromkeys(linears)) for norm, linears in readers.items()}
