"""Llama 1 to 3, and everything that is stored as ``LlamaForCausalLM`` (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

from qaft.arch.base import Family

LLAMA = Family(
    model_type="llama",
    norm="rms",
    embedding="model.embed_tokens",
    attention="model.layers.{i}.self_attn",
    input_norm="model.layers.{i}.input_layernorm",
    query="model.layers.{i}.self_attn.q_proj",
    key="model.layers.{i}.self_attn.k_proj",
    value="model.layers.{i}.self_attn.v_proj",
    output="model.layers.{i}.self_attn.o_proj",
    post_norm="model.layers.{i}.post_attention_layernorm",
    gate="model.layers.{i}.mlp.gate_proj",
    up="model.layers.{i}.mlp.up_proj",
    down="model.layers.{i}.mlp.down_proj",
    final_norm="model.norm",
    lm_head="lm_head",
    # Early checkpoints store the table of rotary frequencies in every layer.
    untouched=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
)
