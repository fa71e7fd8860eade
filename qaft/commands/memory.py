"""Out of memory, said as what was tried and what to change instead of an allocator's traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from qaft.errors import OutOfMemoryError
from qaft.recipe import Recipe
from qaft.train.checkpoint import latest_checkpoint

# What does not come from torch's caching allocator (libraries, the CPU) is a plain RuntimeError.
_MESSAGES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


@contextmanager
def memory_for(what: str, tried: Mapping[str, object], remedy: Callable[[], str]) -> Iterator[None]:
    """Turn an allocation that fails inside the block into an error that can be acted on; other errors pass.

    Args:
        what: the stage, "training".
        tried: recipe key -> value, of what decides how much memory the stage takes.
        remedy: says what to change; called when it has failed.

    Raises:
        OutOfMemoryError: the device or the host has no memory left.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _MESSAGES)):
            raise
        values = ", ".join(f"{key}={value}" for key, value in tried.items())
        cause = str(error).strip().partition("\n")[0]
        message = f"{what}: not enough memory{f' with {values}' if values else ''} ({cause}); {remedy()}"
        raise OutOfMemoryError(message) from error


def loading_memory(tried: Mapping[str, object]) -> AbstractContextManager[None]:
    """Return ``memory_for`` the time in which a model is loaded."""
    return memory_for("loading", tried, lambda: "store it smaller (model.storage: nf4 or int4), or free the device")


def training_memory(recipe: Recipe) -> AbstractContextManager[None]:
    """Return ``memory_for`` training; the message names the last checkpoint, which stays good."""
    train = recipe.train
    tried = {
        "train.batch_size": train.batch_size,
        "data.max_length": recipe.data.max_length,
        "train.gradient_checkpointing": str(train.gradient_checkpointing).lower(),
    }

    def remedy() -> str:
        checkpointing = "set train.gradient_checkpointing=true, which a resumed run may; or, in another train.output, "
        return (
            f"{'in another train.output, ' if train.gradient_checkpointing else checkpointing}lower train.batch_size "
            "and raise train.grad_accumulation by the same factor (the same training), or lower data.max_length. "
            f"Last good checkpoint: {latest_checkpoint(Path(train.output)) or 'none'}"
        )

    return memory_for("training", tried, remedy)


def evaluation_memory(what: str, tried: Mapping[str, object]) -> AbstractContextManager[None]:
    """Return ``memory_for`` running a model that is not trained."""
    shorter = f"lower {' or '.join(tried)}, " if tried else ""
    return memory_for(what, tried, lambda: f"{shorter}free the device, or set CUDA_VISIBLE_DEVICES= to use the CPU")
