"""What llama.cpp has to know of a model family: its name there, the layout of its tensors, its hyperparameters.

    llama          llama.cpp rotates neighbouring rows of a head where transformers rotates halves, so the rows of query
                   and key change places: r = h d + 2 j + s  <-  h d + s d / 2 + j   (head h of width d, s in {0, 1})
    gemma 2, 3     norms are stored as 1 + gamma

Source: ``conversion/`` of llama.cpp (September 2026), and the ``load_arch_hparams`` of its families.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qaft.arch import arch_of
from qaft.arch.base import Arch
from qaft.errors import ExportError


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """A family of llama.cpp.

    Attributes:
        arch: its name there.
        pairs_rows: whether the rows of query and key change places.
        norm_shift: added to the weight of every norm.
        always_tied: whether llama.cpp takes the embedding for the head in any case.
        extras: writes what only this family has.
    """

    arch: MODEL_ARCH
    pairs_rows: bool = False
    norm_shift: float = 0.0
    always_tied: bool = False
    extras: Callable[[GGUFWriter, Any], None] | None = None


def _gemma(writer: GGUFWriter, config: Any) -> None:
    if config.query_pre_attn_scalar != config.head_dim:
        raise ExportError(
            f"config.query_pre_attn_scalar={config.query_pre_attn_scalar}: llama.cpp scales queries of this family by "
            f"head_dim={config.head_dim}; export `merged`"
        )
    writer.add_sliding_window(config.sliding_window)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.attn_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)


def _phi3(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window or 0)


GGUF_FAMILIES: dict[str, GgufFamily] = {
    "gemma2": GgufFamily(arch=MODEL_ARCH.GEMMA2, norm_shift=1.0, always_tied=True, extras=_gemma),
    "gemma3_text": GgufFamily(arch=MODEL_ARCH.GEMMA3, norm_shift=1.0, extras=_gemma),
    "llama": GgufFamily(arch=MODEL_ARCH.LLAMA, pairs_rows=True),
    "mistral": GgufFamily(arch=MODEL_ARCH.LLAMA, pairs_rows=True),
    "phi3": GgufFamily(arch=MODEL_ARCH.PHI3, extras=_phi3),
    "qwen2": GgufFamily(arch=MODEL_ARCH.QWEN2),
    "qwen3": GgufFamily(arch=MODEL_ARCH.QWEN3),
}
"""By the ``model_type`` of transformers: the families that both llama.cpp and transformers read from a GGUF file."""


def gguf_family(config: Any) -> GgufFamily:
    """Return the family of a model.

    Raises:
        ExportError: it is none of ``GGUF_FAMILIES``; the message lists them.
    """
    family = GGUF_FAMILIES.get(config.model_type)
    if family is None:
        raise ExportError(
            f"model_type={config.model_type!r}: gguf is written for {', '.join(sorted(GGUF_FAMILIES))} only; export "
            "`merged`, which llama.cpp's own converter reads"
        )
    return family


def row_order(family: GgufFamily, config: Any, name: str) -> Tensor | None:
    """Return which row of the linear ``name`` becomes which in the file, int64 [O], or None when they stay."""
    arch = arch_of(config)
    if not family.pairs_rows or name not in (*arch.names_of(arch.family.query), *arch.names_of(arch.family.key)):
        return None
    heads = arch.heads_of(name)
    assert heads is not None
    return torch.arange(heads * arch.head_dim).view(heads, 2, arch.head_dim // 2).transpose(1, 2).flatten()


def add_hyperparameters(writer: GGUFWriter, family: GgufFamily, config: Any) -> None:
    """Write the sizes and constants of the model.

    Raises:
        ExportError: the model has a property that its family in llama.cpp has not.
    """
    arch = arch_of(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_block_count(arch.num_layers)
    writer.add_feed_forward_length(arch.intermediate_size)
    writer.add_head_count(arch.num_heads)
    writer.add_head_count_kv(arch.num_kv_heads)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rope(writer, _rope(config), arch)
    if family.extras is not None:
        family.extras(writer, config)


def _rope(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    # Families whose layers differ hold one section for each kind of layer.
    return rope["full_attention"] if "full_attention" in rope else rope


def _add_rope(writer: GGUFWriter, rope: dict[str, Any], arch: Arch) -> None:
    writer.add_rope_dimension_count(int(arch.head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):
        raise ExportError(
            f"rope_type={kind!r}: gguf is written for positions of type default, linear and llama3 only; export "
            "`merged`, which llama.cpp's own converter reads"
        )


def rope_factors(config: Any) -> Tensor | None:
    """Return what llama.cpp divides the rotary frequencies by, fp32 [head_dim / 2]; None when they are plain."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponent = torch.arange(0, len(scaled) * 2, 2, dtype=torch.float64) / (len(scaled) * 2)
    return (rope["rope_theta"] ** -exponent / scaled.double()).float()
