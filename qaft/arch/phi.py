"""Phi-1, Phi-1.5 and Phi-2: LayerNorm, biases everywhere, and one norm per layer that both blocks read in parallel."""

from __future__ import annotations

from qaft.arch.base import Family

_HEAD_NORMS = ("q_layernorm.weight", "q_layernorm.bias", "k_layernorm.weight", "k_layernorm.bias")

PHI = Family(
    model_type="phi",
    norm="layer",
    embedding="model.embed_tokens",
    attention="model.layers.{i}.self_attn",
    input_norm="model.layers.{i}.input_layernorm",
    query="model.layers.{i}.self_attn.q_proj",
    key="model.layers.{i}.self_attn.k_proj",
    value="model.layers.{i}.self_attn.v_proj",
    output="model.layers.{i}.self_attn.dense",
    post_norm=None,
    gate=None,
    up="model.layers.{i}.mlp.fc1",
    down="model.layers.{i}.mlp.fc2",
    final_norm="model.final_layernorm",
    lm_head="lm_head",
    untouched=tuple(f"model.layers.{{i}}.self_attn.{name}" for name in _HEAD_NORMS),
)
