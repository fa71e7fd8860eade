"""Quantization errors of every linear of a checkpoint, with and without each rotation, one decoder layer at a time.

A forward pass of the original model gives the inputs of every linear (``LayerwiseModel``). In each layer the weights
and inputs are brought into each basis in question, quantized there, and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qaft.arch.base import Arch
from qaft.models.attention import put_into_attention
from qaft.models.layerwise import LayerwiseModel
from qaft.rotation.choice import Choice
from qaft.rotation.choose import Bits, LayerErrors
from qaft.rotation.errors import LinearErrors, Quantize, linear_errors, output_energy, vector_error
from qaft.rotation.fuse import Fusion
from qaft.rotation.places import attention_rotation

MEASURED_TOKENS = 512
"""Tokens whose errors are compared, evenly spaced over the calibration set: more change the ratios by a few percent."""

MEASURED_ROWS = 1024
"""Output rows that are quantized and multiplied, evenly spaced; all are rotated."""


@dataclass(frozen=True, kw_only=True)
class Grids:
    """The fake quantizers of a run.

    Attributes:
        weights: module name -> that of its weight, or None where it stays in 16 bits.
        inputs: that of the inputs of linears with a quantized weight, or None.
        reads_integers: module name -> whether its inputs are quantized too, which those of code books are not.
        cache: that of keys and values, or None.
    """

    weights: Callable[[str], Quantize | None]
    inputs: Quantize | None = None
    reads_integers: Callable[[str], bool] = lambda _: True
    cache: Quantize | None = None


def measure_rotations(
    layerwise: LayerwiseModel,
    arch: Arch,
    inputs: Mapping[str, Any],
    real: Tensor,
    grids: Grids,
    available: Choice,
    *,
    rotation: str = "hadamard",
    seed: int = 0,
) -> list[LayerErrors]:
    """Return the errors of each decoder layer, in the order of depth.

    Args:
        layerwise: the checkpoint.
        arch: its names and sizes.
        inputs: arguments of the model, for one batch [B, T].
        real: bool [B, T], False at padding.
        grids: what is quantized, and how.
        available: rotations that are never available are not measured.
        rotation: a key of ``ROTATIONS``.
        seed: of the rotations, as it will be used for fusing them.

    Raises:
        ModelError: a width has no such rotation.
    """
    comparison = _Comparison(arch, grids, available, layerwise.originals, rotation, seed)
    positions = real.flatten().nonzero().squeeze(1)
    index = positions[:: max(1, len(positions) // MEASURED_TOKENS)][:MEASURED_TOKENS]
    if grids.cache is not None:
        put_into_attention(layerwise.model, {name: _CacheProbe(index) for name in arch.attentions()})
    results: list[LayerErrors] = []
    probes: list[_LayerProbe] = []

    def before(_: int, layer: nn.Module) -> None:
        probes.append(_LayerProbe(layer, index))

    def after(i: int, layer: nn.Module) -> None:
        results.append(comparison.compare(i, layer, probes.pop().take()))

    layerwise.run(dict(inputs), before=before, after=after)
    return results


@dataclass
class _Captured:
    """Inputs of the modules of one layer by their names within it, [T, I]; keys and values as [T, heads, head_dim]."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    key: Tensor | None = None
    value: Tensor | None = None


class _CacheProbe(nn.Module):
    """Stands where keys are quantized, and keeps a few instead."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self._index = index
        self.kept: tuple[Tensor, Tensor] | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key_kept, value_kept = (x.transpose(1, 2).flatten(0, 1)[self._index.to(x.device)] for x in (key, value))
        self.kept = key_kept, value_kept
        return query, key, value


class _LayerProbe:
    """Keeps the inputs of all linears and norms of one layer while it runs."""

    def __init__(self, layer: nn.Module, index: Tensor) -> None:
        self._index = index
        self._layer = layer
        self._captured = _Captured()
        parts = [(n, m) for n, m in layer.named_modules() if n and getattr(m, "weight", None) is not None]
        self._handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in parts]

    def take(self) -> _Captured:
        """Return what was kept, and stop keeping."""
        for handle in self._handles:
            handle.remove()
        for probe in self._layer.modules():
            if isinstance(probe, _CacheProbe) and probe.kept is not None:
                self._captured.key, self._captured.value = probe.kept
                probe.kept = None
        return self._captured

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            # Norms of heads get [B, T, heads, head_dim]; nothing asks for them.
            if args[0].dim() <= 3:
                self._captured.inputs[name] = args[0].flatten(0, -2)[self._index.to(args[0].device)]

        return keep


class _Comparison:
    """Measures one layer at a time under every combination of the available rotations."""

    def __init__(
        self,
        arch: Arch,
        grids: Grids,
        available: Choice,
        originals: Mapping[str, Tensor],
        rotation: str,
        seed: int,
    ) -> None:
        self._arch = arch
        self._grids = grids
        self._down = any(available.down)
        self._originals = originals
        self._key_rotation = attention_rotation(arch, rotation=rotation) if any(available.attention) else None
        self._fusions: dict[Bits, Fusion] = {}
        for residual in (False, True) if available.residual else (False,):
            for beside in (False, True):
                choice = Choice.uniform(arch.num_layers, residual=residual, values=beside, down=beside and self._down)
                self._fusions[residual, beside] = Fusion(arch, choice, rotation=rotation, seed=seed)

    def compare(self, i: int, layer: nn.Module, captured: _Captured) -> LayerErrors:
        """Return the errors of decoder layer ``i``; its norms are plain afterwards."""
        prefix = f"{self._arch.layers()[i]}."
        beside = self._beside(i)
        linears = {}
        plain = self._plain_norms(layer, captured, prefix)
        for name, met in beside.items():
            inside = name.removeprefix(prefix)
            weight = layer.get_parameter(f"{inside}.weight")
            linears[name] = self._linear(name, met, captured.inputs[inside], plain, weight)
        return LayerErrors(linears, beside, *self._cache(i, captured))

    def _beside(self, i: int) -> dict[str, str]:
        """Return linear of layer ``i`` -> the rotation that it meets beside R1."""
        layer = self._arch.layers()[i]
        readers = [n for norm, names in self._arch.readers() if norm.startswith(f"{layer}.") for n in names]
        value, output = self._arch.value_outputs()[i]
        up, down = self._arch.up_downs()[i]
        met = {name: "" for name in (*readers, output, down)} | {value: "values", output: "values"}
        if self._down:
            met |= {down: "down"} | ({up: "down"} if self._arch.up_rows()[1] else {})
        return met

    def _plain_norms(self, layer: nn.Module, captured: _Captured, prefix: str) -> dict[str, Tensor]:
        """Return linear -> its inputs once the norm is folded, for the linears that read one; not rotated yet."""
        plain: dict[str, Tensor] = {}
        readers = self._arch.readers() if (True, False) in self._fusions else ()
        for norm, names in readers:
            if norm.startswith(prefix):
                module = layer.get_submodule(norm.removeprefix(prefix))
                self._make_plain(norm, dict(module.named_parameters(recurse=False)))
                folded: Tensor = module(captured.inputs[norm.removeprefix(prefix)])
                plain |= dict.fromkeys(names, folded)
        return plain

    def _make_plain(self, norm: str, parameters: Mapping[str, Tensor]) -> None:
        weight, bias = parameters["weight"], parameters.get("bias")
        if bias is not None:
            bias.copy_(bias / weight if self._arch.shift_stays(norm) else bias.new_zeros(()))
        weight.fill_(0.0 if self._arch.family.norm == "rms_plus_one" else 1.0)

    def _linear(
        self, name: str, met: str, x: Tensor, plain: Mapping[str, Tensor], weight: Tensor
    ) -> dict[Bits, LinearErrors]:
        quantize = self._grids.weights(name)
        inputs = self._grids.inputs if quantize is not None and self._grids.reads_integers(name) else None
        step = max(1, weight.shape[0] // MEASURED_ROWS)
        energy = output_energy(x, weight) / weight.shape[0]
        errors = {}
        for bits, fusion in self._fusions.items():
            if bits[1] and not met:
                continue
            place = fusion.places.get(name)
            turned, turned_x = weight, x
            if place is not None:
                turned = fusion.forward(f"{name}.weight", weight, self._originals)
                turned_x = plain[name] if place.norm is not None else x
                turned_x = turned_x if place.reads is None else place.reads.apply(turned_x)
            rows = turned[::step]
            errors[bits] = linear_errors(turned_x, rows, weights=quantize, inputs=inputs, energy=energy * rows.shape[0])
        return errors

    def _cache(self, i: int, captured: _Captured) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
        quantize, key, value = self._grids.cache, captured.key, captured.value
        if quantize is None or key is None or value is None:
            return None, None
        turned = key if self._key_rotation is None else self._key_rotation(key)
        keys = vector_error(key, quantize), vector_error(turned, quantize)
        writes = self._fusions[False, True].places[self._arch.value_outputs()[i][0]].writes
        assert writes is not None
        return keys, (vector_error(value, quantize), vector_error(writes.rotation(value), quantize))
