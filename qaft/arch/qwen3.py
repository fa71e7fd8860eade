"""Qwen3 (dense): Llama's layout with a norm over each query and key head.

The head norms follow the projections, so the residual basis never reaches them; they do exclude folding anything
through query and key.
"""

from __future__ import annotations

from dataclasses import replace

from qaft.arch.llama import LLAMA

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    untouched=("model.layers.{i}.self_attn.q_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
)
