"""Load a checkpoint as any user of transformers would, to compare with or to evaluate.

What transformers leaves out of a compressed-tensors checkpoint without an error, or computes otherwise than the server
that it was trained for, is put in; see ``served.py``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qaft.errors import ModelError
from qaft.models.served import serving_of


def load_plain(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return model (evaluation mode) and tokenizer of a folder, a ``.gguf`` file or a hub id.

    Args:
        name: what to load.
        device: where to.
        dtype: None for the checkpoint's own.

    Raises:
        ModelError: transformers cannot load it, or it asks for a transform that only its server has.
    """
    path = Path(name)
    where, options = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype or "auto", **options)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: cannot be loaded by transformers: {error}") from error
    model = model.to(device).eval()  # pyright: ignore[reportArgumentType]
    method = (model.config.to_dict().get("quantization_config") or {}).get("quant_method")
    if method == "compressed-tensors":
        with torch.no_grad():
            # It unpacks in the first forward; until then the layers do not have their weights.
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device))
        serving_of(model, name).put_into(model)
    return model, tokenizer
