"""Gemma 2: each block's output is normalized again before it is added, in the basis of the residual stream.

Attention and logits are soft-capped, which depends on the scores and the logits alone: no rotation changes those.
"""

from __future__ import annotations

from dataclasses import replace

from qaft.arch.gemma import GEMMA

GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    post_norm="model.layers.{i}.pre_feedforward_layernorm",
    output_norms=("model.layers.{i}.post_attention_layernorm", "model.layers.{i}.post_feedforward_layernorm"),
)
