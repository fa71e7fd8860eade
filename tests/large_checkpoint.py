"""A Llama of 200 MB in bf16 whose memory is measured: larger than an interpreter's noise, small enough for any machine."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_checkpoint import byte_tokenizer
from transformers import LlamaConfig

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 1024, 2816, 8, 512


def write_large_checkpoint(folder: Path) -> Path:
    """Write the checkpoint, one shard per decoder layer."""
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        vocab_size=VOCAB,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN)}
    shapes |= {"mlp.down_proj": (HIDDEN, INTERMEDIATE), "input_layernorm": (HIDDEN,)}
    shapes |= {"post_attention_layernorm": (HIDDEN,)}
    layer = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    shards = [{f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()} for i in range(LAYERS)]
    rest = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    shards.append({f"{name}.weight": torch.ones(shape, dtype=torch.bfloat16) for name, shape in rest.items()})
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(shard, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
