"""GPT-NeoX and Pythia: LayerNorm, biases, one linear for query, key and value, and blocks in parallel.

Both blocks of a layer read the same stream through norms of their own, so to a change of basis parallel and sequential
blocks are the same.
"""

from __future__ import annotations

from types import MappingProxyType

from qaft.arch.base import Family

_QUERY_KEY_VALUE = "gpt_neox.layers.{i}.attention.query_key_value"

GPT_NEOX = Family(
    model_type="gpt_neox",
    norm="layer",
    embedding="gpt_neox.embed_in",
    attention="gpt_neox.layers.{i}.attention",
    input_norm="gpt_neox.layers.{i}.input_layernorm",
    query=_QUERY_KEY_VALUE,
    key=_QUERY_KEY_VALUE,
    value=_QUERY_KEY_VALUE,
    head_rows="per_head",
    output="gpt_neox.layers.{i}.attention.dense",
    post_norm="gpt_neox.layers.{i}.post_attention_layernorm",
    gate=None,
    up="gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    down="gpt_neox.layers.{i}.mlp.dense_4h_to_h",
    final_norm="gpt_neox.final_layer_norm",
    lm_head="lm_head",
    unbiased=MappingProxyType({_QUERY_KEY_VALUE: "attention_bias", "lm_head": None}),
)
