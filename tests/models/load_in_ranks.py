"""One of two processes of ``test_sharing.py``: ``load_in_ranks.py FOLDER``; leaves rank-<n>.json. Rank 1 cannot read."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import safetensors
import torch
from resident import Mark

from qaft.errors import ModelError
from qaft.models import shards
from qaft.models.load import load_model
from qaft.models.sharing import Sharing
from qaft.sections import ModelSection, QatSection

RANK = int(os.environ["RANK"])
LOADS: dict[str, dict[str, Any]] = {
    "bf16": {"storage": "bf16"},
    "nf4": {"storage": "nf4"},
    "nf4 double": {"storage": "nf4", "double_quant": True},
    "int8": {"storage": "int8"},
    "int4 asymmetric": {"storage": "int4", "qat": {"weights": {"group_size": 32, "symmetric": False}}},
    "int4 rotated": {"storage": "int4", "qat": {"weights": {"group_size": 32}}},
}


def load(checkpoint: Path, name: str, *, share: bool) -> Any:
    options = dict(LOADS[name])
    qat = options.pop("qat", None)
    section = ModelSection(name=str(checkpoint), **options)
    return load_model(
        section,
        qat=None if qat is None else QatSection.model_validate({"rotation": "none", **qat} if "asym" in name else qat),
        latent=lambda layer: qat is not None and layer.endswith("q_proj"),
        share=share,
    )


def digests(loaded: Any) -> dict[str, str]:
    """Name -> dtype, shape and hash of every tensor of a loaded model and of its folded norms."""
    model = loaded.model
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: digest(tensor) for name, tensor in tensors.items()}


def digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def measured(checkpoint: Path) -> dict[str, int] | None:
    """Bytes of the packed model, and the peak of this process above what it held before."""
    try:
        mark = Mark()
    except OSError:
        return None
    model = load(checkpoint, "nf4", share=True).model
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return {"size": size, "peak": mark.peak()}


def error_of(folder: Path) -> str:
    """What a rank says of a checkpoint that is not there."""
    try:
        load(folder / "missing", "nf4", share=True)
    except ModelError as error:
        return str(error)
    return ""


def refuse(path: object, *_: object, **__: object) -> None:
    raise AssertionError(f"rank 1 opened {path}")


def main(folder: Path) -> None:
    if RANK == 1:
        safetensors.safe_open = shards.safe_open = refuse  # type: ignore[assignment, misc]
    facts: dict[str, Any] = {
        "digests": {
            f"{family} {name}": digests(load(folder / family, name, share=True))
            for family in ("untied", "tied")
            for name in LOADS
        },
        "error": error_of(folder),
        "memory": measured(folder / "large"),
        "value": Sharing(torch.device("cpu"), active=True).value(lambda: RANK),
        "alone": Sharing(torch.device("cpu"), active=False).value(lambda: RANK),
    }
    (folder / f"rank-{RANK}.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
