"""Load an exported folder as a stranger would and save its fp32 logits; run as a script in a fresh process.

    python -P reload.py FOLDER REQUEST RESPONSE DEVICE [BASE DTYPE]

REQUEST holds the token ids, RESPONSE gets the logits (safetensors). Nothing of qaft is imported before the model is
loaded, so a checkpoint that needs qaft to load fails here. For an adapter BASE is the folder of its model, in DTYPE.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def load(folder: str, device: str, base: str | None, dtype: str | None) -> Any:
    """Return the model, in evaluation mode and unpacked.

    Raises:
        SystemExit: a tensor is missing, left over or of another shape.
    """
    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    answer: Any = AutoModelForCausalLM.from_pretrained(base or folder, output_loading_info=True, **options)
    model, found = answer
    if problems := {kind: sorted(map(str, names)) for kind, names in found.items() if names}:
        raise SystemExit(f"transformers reports {problems}")
    if base is not None:
        # In fp32, because transformers casts adapters to the dtype of the model that they are put on.
        model = model.float()
        model.load_adapter(folder)
    model = model.to(device).eval()
    with torch.no_grad():
        # compressed-tensors unpacks in the first forward.
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device))
    return model


def main(
    folder: str, request: str, response: str, device: str, base: str | None = None, dtype: str | None = None
) -> None:
    """Answer one request."""
    model = load(folder, device, base, dtype)
    prompts = load_file(request)
    from qaft.evaluate.float32 import float_logits

    logits = float_logits(model, list(prompts.values()))
    save_file(dict(zip(prompts, (t.contiguous() for t in logits), strict=True)), response)


if __name__ == "__main__":
    main(*sys.argv[1:])
