"""A patch on the disk: the touched rows of packed layers, before and after, and what the base must hold.

    patch.safetensors    <layer>.rows [r] int32,  <layer>.old.<part> [r, ...],  <layer>.new.<part> [r, ...]
    patch.json           layout, sizes and bits of each layer, SHA-256 of every tensor of the base
    qaft_export.json     what every export records of itself
    qaft_check.json      what the trained model has answered

    bytes = sum over layers of  4 r + 2 r (bytes of one row of codes, scales and zero points)

Shapes: O = out_features, I = in_features, r = touched rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qaft.errors import ExportError
from qaft.export.fingerprint import FINGERPRINT
from qaft.export.hf_files import write_json
from qaft.export.record import read_stamp
from qaft.tensor_file import save_tensors

TENSORS = "patch.safetensors"
DESCRIPTION = "patch.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayerPatch:
    """The touched rows of one layer.

    Attributes:
        rows: their indices, int32 [r], ascending.
        old: part -> the rows of the base, [r, ...]; see ``packed_rows.rows_of``.
        new: part -> the trained rows, [r, ...].
        out_features: O.
        bits: the width of the codes.
    """

    rows: Tensor
    old: Mapping[str, Tensor]
    new: Mapping[str, Tensor]
    out_features: int
    bits: int


@dataclass(frozen=True, kw_only=True)
class Patch:
    """What turns a packed base into a trained model, and back.

    Attributes:
        name: what the user calls it.
        key: SHA-256 of its tensors.
        layers: module path -> its rows.
        base: tensor name -> SHA-256 of its bytes in the base, for everything that the trained model consists of.
        stamp: what its export has recorded of itself; None where that file is not there.
        answers: what the trained model has answered, see ``Fingerprint``; None with ``verify: false``.
    """

    name: str
    key: str
    layers: Mapping[str, LayerPatch]
    base: Mapping[str, str]
    stamp: Mapping[str, Any] | None = None
    answers: Mapping[str, Any] | None = None


def digest(data: Any) -> str:
    """Return the SHA-256 of a tensor's bytes, or of a buffer."""
    if isinstance(data, Tensor):
        data = as_bytes(data).numpy()
    return hashlib.sha256(data).hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor [R, ...] row by row, uint8 [R, bytes of a row], on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    rows = len(tensor) if tensor.dim() else 1
    # Flat first: beside a dimension of one, strides that a cast of the last dimension refuses count as contiguous.
    return tensor.view(-1).view(torch.uint8).view(rows, -1)


def save_patch(layers: Mapping[str, LayerPatch], base: Mapping[str, str], folder: Path) -> None:
    """Write both files of a patch into ``folder``.

    Raises:
        OSError: a file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.rows"] = layer.rows
        tensors |= {f"{name}.old.{part}": rows for part, rows in layer.old.items()}
        tensors |= {f"{name}.new.{part}": rows for part, rows in layer.new.items()}
    save_tensors({n: t.cpu().contiguous() for n, t in tensors.items()}, folder / TENSORS)
    sizes = {n: {"out_features": p.out_features, "bits": p.bits, "rows": len(p.rows)} for n, p in layers.items()}
    write_json(folder / DESCRIPTION, {"version": VERSION, "layers": sizes, "base": dict(base)})


def load_patch(folder: Path) -> Patch:
    """Return the patch in ``folder``.

    Raises:
        ExportError: there is none, or it is damaged.
    """
    path = folder / TENSORS
    if not path.is_file() or not (folder / DESCRIPTION).is_file():
        raise ExportError(f"{folder}: no patch ({TENSORS} and {DESCRIPTION}); give what `qaft export -f patch` wrote")
    try:
        about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        tensors = load_file(path)
        if about["version"] != VERSION:
            raise ExportError(f"{folder}: a patch of version {about['version']}, this program reads {VERSION}; update")
        layers = {name: _layer(tensors, name, sizes) for name, sizes in about["layers"].items()}
        asked = folder / FINGERPRINT
        answers = json.loads(asked.read_text(encoding="utf-8")) if asked.is_file() else None
    except (SafetensorError, ValueError, KeyError) as error:
        raise ExportError(f"{folder}: damaged ({type(error).__name__}: {error}); export the patch again") from error
    key = hashlib.sha256(path.read_bytes()).hexdigest()
    return Patch(
        name=folder.resolve().name,
        key=key,
        layers=layers,
        base=about["base"],
        stamp=read_stamp(folder),
        answers=answers,
    )


def _layer(tensors: Mapping[str, Tensor], name: str, sizes: Mapping[str, int]) -> LayerPatch:
    def side(which: str) -> dict[str, Tensor]:
        prefix = f"{name}.{which}."
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    rows, old, new = tensors[f"{name}.rows"], side("old"), side("new")
    if not old or old.keys() != new.keys() or any(len(t) != len(rows) for t in (*old.values(), *new.values())):
        raise ValueError(f"{name}: old and new rows do not correspond")
    return LayerPatch(rows=rows, old=old, new=new, out_features=sizes["out_features"], bits=sizes["bits"])
