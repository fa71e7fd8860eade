"""Whether the Triton kernels compute a tensor: they are imported on a GPU only, and nothing needs them."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def on_triton(x: Tensor) -> bool:
    """Return whether ``x`` holds fp32 or 16-bit numbers on a CUDA device for which Triton compiles.

    torch brings Triton, but not the C compiler that Triton builds its launcher with: where a first kernel fails, this
    says so in a warning, once, and torch does the work.
    """
    known = x.device.type == "cuda" and x.is_floating_point() and x.dtype.itemsize in (2, 4)
    return known and _compiles(x.device)


@cache
def _compiles(device: torch.device) -> bool:
    if find_spec("triton") is None:
        return False
    from qaft.native.triton_numerics import probe

    try:
        probe(device)
    except Exception as error:  # Compilers, drivers and Triton itself raise what they like.
        warnings.warn(f"Triton cannot run kernels on {device}, torch will do their work: {error}", stacklevel=3)
        return False
    return True
