"""Model families by the ``model_type`` of their config: adding one is one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qaft.arch.base import Arch, Family
from qaft.arch.llama import LLAMA
from qaft.arch.mistral import MISTRAL
from qaft.arch.qwen2 import QWEN2
from qaft.arch.qwen3 import QWEN3
from qaft.errors import ModelError
from qaft.registry import suggest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}


def arch_of(config: PretrainedConfig) -> Arch:
    """Return the module names and sizes of the model that ``config`` describes.

    Raises:
        ModelError: the family is not known; the message lists those that are.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"model_type={config.model_type!r} is not a known architecture: must be one of "
            f"{', '.join(sorted(FAMILIES))}{suggest(config.model_type, list(FAMILIES))}"
        )
    hidden_size, num_heads = config.hidden_size, config.num_attention_heads
    return Arch(
        family=family,
        num_layers=config.num_hidden_layers,
        hidden_size=hidden_size,
        # Qwen2's config has no head_dim, and a null in others means the same.
        head_dim=getattr(config, "head_dim", None) or hidden_size // num_heads,
        num_heads=num_heads,
        num_kv_heads=config.num_key_value_heads or num_heads,
        tied=bool(config.tie_word_embeddings),
    )


def heads_of(config: PretrainedConfig, name: str) -> int | None:
    """Return how many attention heads the rows of the linear ``name`` belong to; None when it writes no heads.

    Raises:
        ModelError: the family is not known.
    """
    return arch_of(config).heads_of(name)
