"""``quantization_config`` of a compressed-tensors checkpoint, built and validated by the library's own models."""

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
    """One affine grid: ``group_size`` weights per scale, None for one scale per output channel."""

    bits: int
    group_size: int | None
    symmetric: bool

    def describe(self) -> dict[str, Any]:
        """Return the grid as plain values, for the stamp and the card."""
        return {"kind": "int", **asdict(self)}


def quantization_config(grids: Mapping[str, PackedGrid], dense: Sequence[str]) -> dict[str, Any]:
    """Return the config section for layers on one or several grids.

    Args:
        grids: module path -> its grid.
        dense: module paths of the linear layers that are not packed, the head among them.

    Raises:
        ExportError: transformers cannot read this combination of grids.
    """
    kinds = sorted(set(grids.values()), key=lambda g: (g.bits, g.group_size or 0, g.symmetric))
    if len(kinds) > 1 and not all(kind.symmetric for kind in kinds):
        raise ExportError(
            f"layers lie on {len(kinds)} grids with zero points among them, of which transformers reads only one: set "
            "qat.weights.symmetric to true, or give frozen layers the grid of the trained ones (model.storage: int4 "
            "with bits: 4, int8_group with bits: 8), or export `merged`"
        )
    groups = {
        f"group_{i}": _scheme(kind, ["Linear"] if len(kinds) == 1 else [n for n, grid in grids.items() if grid == kind])
        for i, kind in enumerate(kinds)
    }
    config = QuantizationConfig(
        config_groups=groups,  # pyright: ignore[reportArgumentType]
        format=CompressionFormat.pack_quantized.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(dense),
    )
    section = {"version": compressed_tensors.__version__, **config.model_dump(mode="json")}
    # transformers 5.23 cannot load packed zero points into its compressed layout (it expects them unpacked), but it can
    # unpack while it loads. vLLM does not read this key.
    return section if kinds[0].symmetric else {**section, "dequantize": True}


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
    return QuantizationScheme(targets=targets, weights=weights, format=CompressionFormat.pack_quantized)
