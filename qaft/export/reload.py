"""Load an exported folder as a stranger would and save its fp32 logits; run as a script in a fresh process.

    python -P reload.py FOLDER REQUEST RESPONSE DEVICE [BASE DTYPE]

REQUEST holds the token ids, RESPONSE gets the logits (safetensors, see answer.py). Nothing of qaft is imported before
the model is loaded, so a checkpoint that needs qaft to load fails here. For an adapter BASE is the folder of its model,
in DTYPE. A GGUF file in FOLDER is loaded in the dtype of the config beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING


def load(folder: str, device: str, base: str | None, dtype: str | None) -> Any:
    """Return the model, in evaluation mode and unpacked.

    Raises:
        ValueError: a tensor is missing, left over or of another shape; or see ``gguf_options``.
    """
    options = gguf_options(Path(folder)) if dtype is None else {"dtype": getattr(torch, dtype)}
    answer: Any = gptq_model(folder) or AutoModelForCausalLM.from_pretrained(
        base or folder, output_loading_info=True, **options
    )
    model, found = answer
    if problems := {kind: sorted(map(str, names)) for kind, names in found.items() if names}:
        raise ValueError(f"transformers reports {problems}")
    if base is not None:
        # In fp32, because transformers casts adapters to the dtype of the model that they are put on.
        model = model.float()
        model.load_adapter(folder)
    model = model.to(device).eval()
    if getattr(model, "quantization_method", None) == "bitsandbytes":
        # On a CPU its first forward replaces the scales by rounded ones.
        return model
    with torch.no_grad():
        # compressed-tensors unpacks in the first forward.
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device))
    return model


def gptq_model(folder: str) -> Any:
    """Return model and loading info of a GPTQ checkpoint, unpacked by its published formula; None for other folders.

    The layers that transformers puts in multiply code and scale in fp16; what is compared is what the file holds.
    """
    path = Path(folder, "config.json")
    section = json.loads(path.read_text(encoding="utf-8")).get("quantization_config", {}) if path.is_file() else {}
    if section.get("quant_method") != "gptq":
        return None
    config: Any = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    state = gptq_state(Path(folder), section, config.dtype)
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=config.dtype, output_loading_info=True)


def gptq_state(folder: Path, section: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a GPTQ checkpoint, every packed layer as its weight in ``dtype``."""
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    for layer in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        qweight, qzeros, scales, g_idx = (stored.pop(f"{layer}.{k}") for k in ("qweight", "qzeros", "scales", "g_idx"))
        shifts, mask = torch.arange(0, 32, section["bits"]), (1 << section["bits"]) - 1
        codes = (qweight.unsqueeze(1) >> shifts[:, None] & mask).flatten(0, 1)  # [I, O]
        zeros = (qzeros.unsqueeze(2) >> shifts & mask).flatten(1, 2)[:, : scales.shape[1]]  # [G, O]
        zeros += section["checkpoint_format"] == "gptq"
        stored[f"{layer}.weight"] = (scales.float()[g_idx] * (codes - zeros[g_idx])).T.to(dtype).contiguous()
    return stored


def gguf_options(folder: Path) -> dict[str, Any]:
    """Return how to load the GGUF file of ``folder``, or nothing when there is none.

    transformers reads some of the hyperparameters of a GGUF file (no scaled positions, say): these are taken from the
    file, so that they are checked, and all others from the config beside it.

    Raises:
        ValueError: the file has another frequency of positions than the config.
    """
    file = next(folder.glob("*.gguf"), None)
    if file is None:
        return {}
    config, beside = AutoConfig.from_pretrained(folder, gguf_file=file.name), AutoConfig.from_pretrained(folder)
    read = {"architectures", "model_type", *GGUF_CONFIG_MAPPING[config.model_type.removesuffix("_text")].values()}
    theirs, ours = (c.rope_parameters.get("full_attention", c.rope_parameters) for c in (config, beside))
    if theirs["rope_theta"] != ours["rope_theta"]:
        raise ValueError(f"the file has rope_theta={theirs['rope_theta']}, the config {ours['rope_theta']}")
    for key, value in beside.to_dict().items():
        if key not in read:
            setattr(config, key, value)
    return {"config": config, "dtype": beside.dtype, "gguf_file": file.name}


def main(
    folder: str, request: str, response: str, device: str, base: str | None = None, dtype: str | None = None
) -> None:
    """Answer one request."""
    model = load(folder, device, base, dtype)
    from qaft.export.answer import answer

    save_file(answer(model, folder, load_file(request)), response)


if __name__ == "__main__":
    main(*sys.argv[1:])
