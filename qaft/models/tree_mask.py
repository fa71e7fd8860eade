"""Rows in which several continuations of one text stand beside each other, none of which sees another.

    place i sees place j:   j <= i  and  (branch(j) = 0  or  branch(j) = branch(i))        0: what all continue

transformers hands a mask of four axes to every layer as it is; kernels that read none (flash attention) cannot do this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qaft.errors import IncompatibleError
from qaft.models.attention import WRAPPABLE, attention_function


def check_tree_attention(model: Any, *, max_length: int) -> None:
    """Guarantee that the attention of a model takes ``tree_mask``, for rows of at most ``max_length`` tokens.

    Raises:
        IncompatibleError: it reads no mask, or some layers look back over a part of the row only, which the mask, the
            same for all layers, would undo.
    """
    function = attention_function(model)
    if function not in WRAPPABLE:
        raise IncompatibleError(
            f"data.classification.loss=options with options of several tokens: model.attention={function!r} takes no "
            f"mask that keeps them apart; must be one of {', '.join(WRAPPABLE)} (options that differ in their last "
            "token alone need none)"
        )
    config = model.config.get_text_config()
    for key in ("sliding_window", "attention_chunk_size"):
        # Only some families have these keys, and transformers gives the others no default.
        width = getattr(config, key, None)
        if width is not None and width < max_length:
            raise IncompatibleError(
                f"data.classification.loss=options with options of several tokens: layers of this model see {width} "
                f"tokens ({key}), and the mask that keeps options apart is the same for all layers; set "
                f"data.max_length to at most {width}, or verbalizers that differ in their last token alone"
            )


def tree_mask(model: Any, branches: Tensor) -> Tensor:
    """Return who sees whom in the form that the model's attention takes, [B, 1, T, T].

    Args:
        model: a transformers causal LM with attention ``eager`` or ``sdpa``.
        branches: [B, T], 0 for what all continue.
    """
    # Every place sees itself, padding too: a row without anything to see would be NaN.
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    seen = seen.tril().unsqueeze(1)
    if attention_function(model) == "sdpa":
        return seen
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
