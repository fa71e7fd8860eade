"""Queries, keys and values between RoPE and attention: the place of R3 and of the quantized KV cache.

transformers calls attention through a table of functions by name. A model whose keys are to be changed gets a name of
its own there, for a function that changes them and then calls the one that the model had; no forward is copied.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qaft.errors import ModelError
from qaft.rotation.base import Rotation

WRAPPABLE = ("eager", "sdpa")
"""Attention functions that do not look up their own name."""

_CHILD = "attention_inputs"
_PREFIX = "qaft_"


class AttentionInputs(nn.Module):
    """``(q, k, v) -> (q R, key(k R), value(v))``; the scores q k^T are those without R, until ``key`` rounds.

    Args:
        rotation: R3, of the last axis of queries and keys, or None.
        key: fake quantizer of the cached keys, [batch, heads, tokens, head_dim], or None.
        value: fake quantizer of the cached values, or None.
    """

    def __init__(
        self, *, rotation: Rotation | None = None, key: nn.Module | None = None, value: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.rotation = rotation
        self.key = key
        self.value = value

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what attention works on; each of shape [batch, heads, tokens, head_dim]."""
        if self.rotation is not None:
            query, key = self.rotation(query), self.rotation(key)
        return query, key if self.key is None else self.key(key), value if self.value is None else self.value(value)


def attention_function(model: PreTrainedModel) -> str:
    """Return the name of a model's attention function, without what ``put_into_attention`` adds."""
    return (model.config._attn_implementation or "eager").removeprefix(_PREFIX)


def put_into_attention(model: PreTrainedModel, inputs: Mapping[str, nn.Module]) -> None:
    """Let queries, keys and values of the named attention modules pass through the given modules.

    Args:
        model: its attention function is replaced by one of the same kind.
        inputs: attention module (see ``Arch.attentions``) -> a module as ``AttentionInputs``, which becomes its child.

    Raises:
        ModelError: the attention function of the model cannot be wrapped.
    """
    name = model.config._attn_implementation or "eager"
    if not name.startswith(_PREFIX):
        if name not in WRAPPABLE:
            raise ModelError(
                f"model.attention={name!r}: keys cannot be rotated or quantized in it; must be one of "
                f"{', '.join(WRAPPABLE)}"
            )
        AttentionInterface.register(_PREFIX + name, partial(_attend, name))
        AttentionMaskInterface.register(_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
        model.set_attn_implementation(_PREFIX + name)
    for path, module in inputs.items():
        attention = model.get_submodule(path)
        if attention_inputs(attention) is not None:
            raise ValueError(f"{path}: queries, keys and values are transformed already")
        attention.add_module(_CHILD, module)


def attention_inputs(attention: nn.Module) -> nn.Module | None:
    """Return what queries, keys and values of an attention module pass through, or None."""
    return attention._modules.get(_CHILD)


def take_from_attention(attention: nn.Module) -> None:
    """Undo ``put_into_attention`` for one attention module."""
    del attention._modules[_CHILD]


def _attend(base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    inputs = attention_inputs(module)
    if inputs is not None:
        query, key, value = inputs(query, key, value)
    return _function(base, module)(module, query, key, value, *args, **kwargs)


def _function(base: str, module: nn.Module) -> Callable[..., Any]:
    if base == "eager":
        # Families have their own (soft caps, sinks), beside the module that calls it.
        return sys.modules[type(module).__module__].eager_attention_forward  # pyright: ignore[reportAttributeAccessIssue]
    return ALL_ATTENTION_FUNCTIONS[base]
