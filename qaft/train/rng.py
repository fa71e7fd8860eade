"""The global random number generators as plain values."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

RngState = dict[str, Any]


def capture_rng(device: torch.device) -> RngState:
    """Return the states of Python's, NumPy's and torch's global generators (and of ``device`` when it is a GPU)."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: RngState = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, cached),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: RngState, device: torch.device) -> None:
    """Put back what ``capture_rng`` returned; a GPU state is used when there is one on both sides."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
