"""Gemma 3, text models: Gemma 2's layout with a norm over each query and key head."""

from __future__ import annotations

from dataclasses import replace

from qaft.arch.gemma2 import GEMMA2

GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    untouched=("model.layers.{i}.self_attn.q_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
)
