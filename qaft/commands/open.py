"""Open whatever a user may name as a model: a run folder, an exported folder, a checkpoint or an id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qaft.build import Run, default_device, is_run_folder, restore_run
from qaft.commands.memory import loading_memory
from qaft.errors import ModelError
from qaft.export.record import adapted_model, read_stamp


@dataclass(frozen=True)
class OpenedModel:
    """A model ready for inference; ``run`` is set when it came from a run folder."""

    name: str
    model: Any
    tokenizer: Any
    run: Run | None = None


def open_model(name: str, *, exact: bool = False) -> OpenedModel:
    """Load a run (with its fake quantization, as trained), an export of any format, or any checkpoint.

    Args:
        name: a folder, a ``.gguf`` file or a hub id.
        exact: an adapter of an export and its base in 32 bits, to be compared: transformers rounds an adapter to the
            dtype of its base.

    Raises:
        ModelError: it is none of these, or a patch without its base.
        OutOfMemoryError: it does not fit.
    """
    require_whole(name)
    with loading_memory({"model": name}):
        if is_run_folder(name):
            run = restore_run(name)
            return OpenedModel(name, run.loaded.model.eval(), run.loaded.tokenizer, run)
        stamp = read_stamp(Path(name))
        if stamp is not None and (exact or stamp.get("format") != "peft" or _is_file(stamp["base_model"])):
            return _open_export(name, stamp)
        from qaft.models.plain import load_plain

        model, tokenizer = load_plain(name, device=default_device())
        return OpenedModel(name, model, tokenizer)


def require_whole(name: str) -> None:
    """Refuse a folder that is no model by itself, before anything is loaded.

    Raises:
        ModelError: it is a patch.
    """
    stamp = read_stamp(Path(name))
    if stamp is not None and stamp.get("format") == "patch":
        raise ModelError(
            f"{name}: a patch holds the trained rows alone; put it onto its base, `qaft patch apply {name} --base BASE "
            "--out FOLDER`, and give that FOLDER (`qaft patch base RUN --out BASE` writes the base)"
        )


def _is_file(base: str) -> bool:
    """Return whether an adapter's base is a ``.gguf`` file, where transformers does not find it by the adapter."""
    return base.endswith(".gguf")


def _open_export(name: str, stamp: Mapping[str, Any]) -> OpenedModel:
    """Load an exported folder by the very code that its verification loads it with in a fresh process.

    Raises:
        ModelError: it cannot be loaded, or asks for a transform that only its server has.
    """
    from transformers import AutoTokenizer

    from qaft.export.reload import load
    from qaft.models.served import serving_of
    from qaft.models.source import open_source

    try:
        base, dtype = adapted_model(stamp)
        if base is not None and dtype is not None and _is_file(base):
            base = str(open_source(base, dtype=getattr(torch, dtype)).folder)
        model = load(name, str(default_device()), base, dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: this export cannot be loaded: {error}; export the run again") from error
    if base is None:
        serving_of(model, name).put_into(model)
    return OpenedModel(name, model, tokenizer)
