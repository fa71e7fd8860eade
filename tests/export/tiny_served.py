"""Runs with quantized inputs, and with R4 where asked for, as ``qaft.build`` puts them together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_export import trained

from qaft.arch import arch_of
from qaft.models.load import LoadedModel
from qaft.models.online import put_online
from qaft.models.source import open_source
from qaft.quant import KVQuantizer, TokenQuantizer
from qaft.quant.compressed_tokens import CompressedTensorsTokens
from qaft.rotation.choice import Choice
from qaft.sections import GridSection, QatSection

SCHEMES: dict[str, tuple[int, int | None, int | None]] = {
    "W4A16": (4, 32, None),
    "W8A16": (8, 32, None),
    "W8A8": (8, None, 8),
    "W8A8 in groups": (8, 32, 8),
    "W4A8": (4, 32, 8),
    "W4A4": (4, 32, 4),
}
"""Bits of weights, their group size, bits of inputs."""


def served(
    path: Path,
    scheme: str,
    *,
    profile: str = "portable",
    function: str = "vllm",
    cache: KVQuantizer | None = None,
    storage: str = "bf16",
    per_channel: bool = False,
    down: Callable[[int], bool] = lambda layer: True,
    **options: Any,
) -> LoadedModel:
    """A trained model of a scheme; in profile vllm its layers with ``down(i)`` have R4."""
    bits, group_size, inputs = SCHEMES[scheme]
    group_size = None if per_channel else group_size
    arch = arch_of(open_source(str(path)).config)
    rotated = [i for i in range(arch.num_layers) if profile == "vllm" and down(i)]
    choice = Choice.of_layers(arch.num_layers, residual=True, values=range(arch.num_layers), down=rotated)
    grid = QatSection(weights=GridSection(bits=bits, group_size=group_size))
    loaded = trained(path, "dense", qat=grid, storage=storage, choice=choice, **options)
    quantizer = None
    if inputs is not None:
        quantizer = TokenQuantizer(bits=inputs) if function == "vllm" else CompressedTensorsTokens(bits=inputs)
    put_online(loaded.model, arch, choice, inputs=quantizer, cache=cache)
    return loaded
