"""``quantization_config`` of a compressed-tensors checkpoint, built and validated by the library's own models.

    weights, inputs      file of the weights      what runs it in vLLM 0.33
    W4A16, W8A16         pack-quantized           WNA16: Marlin, Machete
    W8A8, per channel    int-quantized            W8A8Int8: CUTLASS, Triton (compute capability 7.5 and up)
    W8A8 in groups       pack-quantized           WNA8Int: Humming, with --linear-backend humming
    W4A8                 pack-quantized           WNA8Int: Humming, with --linear-backend humming
    W4A4, W8A4           pack-quantized           WNA4Int: Humming, with --linear-backend humming

Inputs are symmetric integers with a scale per token, computed as they come: of dynamic schemes it is the one that all
of these have. Left to itself, vLLM gives WNA8Int and WNA4Int the first kernel that fits their weights, Machete or
Marlin, which multiply inputs in 16 bits; only Humming reads how inputs are quantized.

Source: vLLM 0.33.0, ``layers/quantization/compressed_tensors/compressed_tensors.py`` (``_get_scheme_from_parts``) and
``kernels/linear/__init__.py`` (``choose_mp_linear_kernel``); compressed-tensors 0.20.0, ``compressors/``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import compressed_tensors
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)

from qaft.errors import ExportError

PACKABLE_BITS = (4, 8)
"""Widths that the readers of packed integers support (vLLM's WNA16 kernels)."""


@dataclass(frozen=True, order=True)
class PackedGrid:
    """One affine grid: ``group_size`` weights per scale, None for one scale per output channel.

    Attributes:
        bits: of a weight.
        group_size: weights per scale.
        symmetric: no zero points.
        inputs: bits of the inputs of the layer, None for 16-bit inputs.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    inputs: int | None = None

    @property
    def scheme(self) -> str:
        """Return what the combination is called, ``W4A16``."""
        return f"W{self.bits}A{self.inputs or 16}"

    @property
    def packed(self) -> bool:
        """Return whether the codes are packed into int32; an int8 tensor is what the int8 kernels read."""
        return not (self.bits == self.inputs == 8 and self.group_size is None and self.symmetric)

    def describe(self) -> dict[str, Any]:
        """Return the grid as plain values, for the stamp and the card."""
        return {"kind": "int", **asdict(self)}


def quantization_config(
    grids: Mapping[str, PackedGrid], dense: Sequence[str], *, transforms: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the config section for layers on one or several grids.

    Args:
        grids: module path -> its grid.
        dense: module paths of the linear layers that are not packed, the head among them.
        transforms: the section ``transform_config``, or None.

    Raises:
        ExportError: transformers cannot read this combination of grids.
    """
    kinds = sorted(set(grids.values()), key=lambda g: (g.bits, g.group_size or 0, g.symmetric, g.inputs or 16))
    if not all(kind.symmetric for kind in kinds):
        _require_readable_zero_points(kinds)
    groups = {
        f"group_{i}": _scheme(kind, ["Linear"] if len(kinds) == 1 else [n for n, grid in grids.items() if grid == kind])
        for i, kind in enumerate(kinds)
    }
    formats = {_format(kind) for kind in kinds}
    config = QuantizationConfig(
        config_groups=groups,  # pyright: ignore[reportArgumentType]
        format=(formats.pop() if len(formats) == 1 else CompressionFormat.mixed_precision).value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(dense),
    )
    section = {"version": compressed_tensors.__version__, **config.model_dump(mode="json")}
    if transforms is not None:
        section["transform_config"] = dict(transforms)
    # transformers 5.23 cannot load packed zero points into its compressed layout (it expects them unpacked), but it can
    # unpack while it loads. vLLM does not read this key.
    return section if kinds[0].symmetric else {**section, "dequantize": True}


def _require_readable_zero_points(kinds: Sequence[PackedGrid]) -> None:
    if len(kinds) > 1:
        raise ExportError(
            f"layers lie on {len(kinds)} grids with zero points among them, of which transformers reads only one: set "
            "qat.weights.symmetric to true, or give frozen layers the grid of the trained ones (model.storage: int4 "
            "with bits: 4, int8_group with bits: 8), or export `merged`"
        )
    if kinds[0].inputs is not None:
        raise ExportError(
            "weights with zero points are unpacked by transformers while it loads them, after which it does not "
            "quantize the inputs of the layer: set qat.weights.symmetric to true, or leave qat.activations out"
        )


def _format(grid: PackedGrid) -> CompressionFormat:
    return CompressionFormat.pack_quantized if grid.packed else CompressionFormat.int_quantized


def _scheme(grid: PackedGrid, targets: list[str]) -> QuantizationScheme:
    strategy = QuantizationStrategy.CHANNEL if grid.group_size is None else QuantizationStrategy.GROUP
    weights = QuantizationArgs(
        num_bits=grid.bits,
        type=QuantizationType.INT,
        symmetric=grid.symmetric,
        strategy=strategy,
        group_size=grid.group_size,
        dynamic=False,
    )
    return QuantizationScheme(targets=targets, weights=weights, input_activations=_inputs(grid), format=_format(grid))


def _inputs(grid: PackedGrid) -> QuantizationArgs | None:
    if grid.inputs is None:
        return None
    return QuantizationArgs(
        num_bits=grid.inputs,
        type=QuantizationType.INT,
        symmetric=True,
        strategy=QuantizationStrategy.TOKEN,
        dynamic=True,
    )
