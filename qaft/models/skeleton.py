"""A model without weights: module names and shapes on the meta device, and the buffers that no checkpoint stores."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qaft.errors import ModelError


def empty_model(
    config: PretrainedConfig, *, dtype: torch.dtype, attention: str = "sdpa", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model of ``config`` on the meta device, in evaluation mode; ``config`` itself is not changed.

    Raises:
        ModelError: transformers cannot build it, for example because the attention is not installed.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
            )
    except (ImportError, ValueError) as error:
        raise ModelError(
            f"{config.model_type}: transformers cannot build it with model.attention={attention!r}: {error}; "
            "`sdpa` and `eager` need nothing to be installed"
        ) from error
    return model.eval()


def block_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers but the output head, by module path.

    Raises:
        ModelError: there are none (families like GPT-2 use other layers).
    """
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not linears:
        raise ModelError(f"{model.config.model_type}: the blocks hold no torch.nn.Linear, so there is nothing to adapt")
    return linears


def linear_names(config: PretrainedConfig, *, trust_remote_code: bool = False) -> tuple[str, ...]:
    """Return the module paths of the linear layers that can be adapted: not the embeddings, not the head.

    Raises:
        ModelError: the model has none.
    """
    model = empty_model(config, dtype=torch.float32, attention="eager", trust_remote_code=trust_remote_code)
    return tuple(block_linears(model))


def initialize_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give every buffer that checkpoints do not store (rotary frequencies) its value, on ``device``.

    The family's own initialization runs over the whole model; tensors marked as initialized are left alone, which the
    loader does for all that it sets.
    """
    for name, buffer in list(model.named_buffers()):
        if buffer.device.type != "meta":
            continue
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._buffers[leaf] = torch.empty_like(buffer, device=device)
    model.initialize_weights()


def mark_initialized(item: Any) -> None:
    """Tell transformers that a tensor or module holds its final value."""
    item._is_hf_initialized = True
