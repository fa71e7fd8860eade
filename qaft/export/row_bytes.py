"""Rows of packed layers inside safetensors files, read and written in place as bytes.

The header of a file stays as it is, so that writing back what was there before gives the same file. Zero points, which
files pack along the rows, are unpacked and packed again.

Shapes: O = out_features, G = groups along the inputs, r = rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qaft.export.packed_rows import ZERO_POINT
from qaft.export.patch_file import LayerPatch, as_bytes
from qaft.quant.packing import pack_zero_point, unpack_zero_point

Bytes = npt.NDArray[np.uint8]


def put_rows(shards: Mapping[str, Path], name: str, layer: LayerPatch, rows: Mapping[str, Tensor]) -> None:
    """Write rows of a stored layer.

    Args:
        shards: tensor name -> file, which is changed.
        name: module path of the layer.
        layer: says which rows.
        rows: part -> their values, [r, ...].
    """
    index = layer.rows.long().numpy()
    for part, values in rows.items():
        tensor = f"{name}.{part}"
        stored = tensor_bytes(shards[tensor], tensor, mode="r+")
        if part == ZERO_POINT:
            every = _zero_points(stored, layer)
            every[index] = values
            stored[:] = as_bytes(pack_zero_point(every, layer.bits)).numpy().reshape(stored.shape)
        else:
            stored.reshape(layer.out_features, -1)[index] = as_bytes(values).numpy()
        stored.flush()


def holds(shards: Mapping[str, Path], name: str, layer: LayerPatch, rows: Mapping[str, Tensor]) -> bool:
    """Return whether the stored layer has these values in the rows of the patch."""
    index = layer.rows.long().numpy()
    for part, values in rows.items():
        stored = tensor_bytes(shards[f"{name}.{part}"], f"{name}.{part}")
        if part == ZERO_POINT:
            equal = torch.equal(_zero_points(stored, layer)[index], values)
        elif stored.size % layer.out_features:
            equal = False
        else:
            equal = np.array_equal(stored.reshape(layer.out_features, -1)[index], as_bytes(values).numpy())
        if not equal:
            return False
    return True


def _zero_points(stored: Bytes, layer: LayerPatch) -> Tensor:
    """Return int8 [O, G] of what the file packs along O."""
    words = -(-layer.out_features * layer.bits // 32)
    packed = torch.from_numpy(np.array(stored)).view(torch.int32).view(words, -1)
    return unpack_zero_point(packed, layer.bits, layer.out_features)


def tensor_bytes(path: Path, name: str, *, mode: Any = "r") -> Any:
    """Return the bytes of a tensor in a safetensors file, mapped: uint8 [bytes]."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, stop = json.loads(file.read(length))[name]["data_offsets"]
    return np.memmap(path, dtype=np.uint8, mode=mode, offset=8 + length + start, shape=(stop - start,))
