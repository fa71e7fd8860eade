"""Phi-3 and Phi-4: Llama's blocks with one linear for query, key and value, and one for gate and up."""

from __future__ import annotations

from dataclasses import replace

from qaft.arch.llama import LLAMA

_QUERY_KEY_VALUE = "model.layers.{i}.self_attn.qkv_proj"
_GATE_UP = "model.layers.{i}.mlp.gate_up_proj"

PHI3 = replace(
    LLAMA,
    model_type="phi3",
    query=_QUERY_KEY_VALUE,
    key=_QUERY_KEY_VALUE,
    value=_QUERY_KEY_VALUE,
    head_rows="stacked",
    gate=_GATE_UP,
    up=_GATE_UP,
    untouched=(),
)
