"""What a fresh process answers about the checkpoint that it has loaded, as named tensors; see ``reload.py``.

request     0000 ..  prompts, int64 [T]          inputs.LAYER  what the trained model's layer has read, fp32 [T, I]
response    0000 ..  fp32 logits [T, V]          native.0000 ..  logits in the checkpoint's 16 bits
            codes.LAYER  integers of the inputs, int16 [T, I]
            plain.0000 .., plain_codes.LAYER     as transformers runs it, where servers run another function
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qaft.evaluate.float32 import float_logits, native_logits
from qaft.export.sites import input_codes
from qaft.models.served import Serving, serving_of

INPUTS, NATIVE, CODES, PLAIN, PLAIN_CODES = "inputs.", "native.", "codes.", "plain.", "plain_codes."


def answer(model: Any, folder: str, request: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the response to a request; the model computes as its server does afterwards.

    Raises:
        ModelError: the checkpoint asks for a transform that only its server has.
    """
    inputs = part_of(request, INPUTS)
    prompts = {name: ids for name, ids in request.items() if not name.startswith(INPUTS)}
    serving = serving_of(model, folder) if (Path(folder) / "config.json").is_file() else Serving({}, {})
    found: dict[str, Tensor] = {}
    if serving.quantizers and not serving.rotations:
        found |= _numbered(PLAIN, prompts, float_logits(model, list(prompts.values())))
        found |= _named(PLAIN_CODES, input_codes(model, inputs))
    serving.put_into(model)
    found |= _numbered("", prompts, float_logits(model, list(prompts.values())))
    found |= _named(CODES, input_codes(model, inputs))
    if model.dtype != torch.float32:
        found |= _numbered(NATIVE, prompts, native_logits(model, list(prompts.values())))
    return found


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, without it, in the order of their names."""
    return {name.removeprefix(prefix): tensors[name] for name in sorted(tensors) if name.startswith(prefix)}


def _numbered(prefix: str, prompts: Mapping[str, Tensor], logits: Sequence[Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor.contiguous() for name, tensor in zip(prompts, logits, strict=True)}


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}
