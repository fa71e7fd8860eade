"""Open whatever a user may name as a model: a run folder, an exported folder, a checkpoint or an id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qaft.build import Run, default_device, is_run_folder, restore_run
from qaft.commands.memory import loading_memory


@dataclass(frozen=True)
class OpenedModel:
    """A model ready for inference; ``run`` is set when it came from a run folder."""

    name: str
    model: Any
    tokenizer: Any
    run: Run | None = None


def open_model(name: str) -> OpenedModel:
    """Load a run (with its fake quantization, as trained) or any checkpoint through plain transformers.

    Raises:
        ModelError: it is neither.
        OutOfMemoryError: it does not fit.
    """
    with loading_memory({"model": name}):
        if is_run_folder(name):
            run = restore_run(name)
            return OpenedModel(name, run.loaded.model.eval(), run.loaded.tokenizer, run)
        from qaft.models.plain import load_plain

        model, tokenizer = load_plain(name, device=default_device())
        return OpenedModel(name, model, tokenizer)
