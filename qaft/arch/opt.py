"""OPT: LayerNorm, biases, learned positions; all sizes but 350m, which normalizes after each block and projects."""

from __future__ import annotations

from types import MappingProxyType

from qaft.arch.base import Family

_LAYER = "model.decoder.layers.{i}"
_READERS = tuple(f"{_LAYER}.{part}" for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1"))

OPT = Family(
    model_type="opt",
    norm="layer",
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    attention=f"{_LAYER}.self_attn",
    input_norm=f"{_LAYER}.self_attn_layer_norm",
    query=f"{_LAYER}.self_attn.q_proj",
    key=f"{_LAYER}.self_attn.k_proj",
    value=f"{_LAYER}.self_attn.v_proj",
    output=f"{_LAYER}.self_attn.out_proj",
    post_norm=f"{_LAYER}.final_layer_norm",
    gate=None,
    up=f"{_LAYER}.fc1",
    down=f"{_LAYER}.fc2",
    final_norm="model.decoder.final_layer_norm",
    lm_head="lm_head",
    unbiased=MappingProxyType({**dict.fromkeys(_READERS, "enable_bias"), "lm_head": None}),
    residual_needs=MappingProxyType(
        {"do_layer_norm_before": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False}
    ),
)
