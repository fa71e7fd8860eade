"""Model families by the ``model_type`` of their config: adding one is one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qaft.arch.base import Arch, Family
from qaft.arch.gemma import GEMMA
from qaft.arch.gemma2 import GEMMA2
from qaft.arch.gemma3 import GEMMA3
from qaft.arch.gpt_neox import GPT_NEOX
from qaft.arch.llama import LLAMA
from qaft.arch.mistral import MISTRAL
from qaft.arch.opt import OPT
from qaft.arch.phi import PHI
from qaft.arch.phi3 import PHI3
from qaft.arch.qwen2 import QWEN2
from qaft.arch.qwen3 import QWEN3
from qaft.errors import ModelError
from qaft.registry import suggest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES: dict[str, Family] = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "opt": OPT,
    "phi": PHI,
    "phi3": PHI3,
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
        intermediate_size=getattr(config, "ffn_dim", None) or config.intermediate_size,
        # Qwen2's config has no head_dim, and a null in others means the same.
        head_dim=getattr(config, "head_dim", None) or hidden_size // num_heads,
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        tied=bool(config.tie_word_embeddings),
        unbiased=frozenset(
            linear for linear, switch in family.unbiased.items() if switch is None or not getattr(config, switch)
        ),
        residual_obstacle=_residual_obstacle(family, config),
    )


def _residual_obstacle(family: Family, config: PretrainedConfig) -> str | None:
    if family.output_norms:
        return "it scales the channels of what each block adds to the residual stream"
    for key, needed in family.residual_needs.items():
        if getattr(config, key) != needed:
            return f"its config has {key}={getattr(config, key)!r}, which needs to be {needed!r}"
    return None


def heads_of(config: PretrainedConfig, name: str) -> int | None:
    """Return how many attention heads the rows of the linear ``name`` belong to; None when it writes no heads.

    Raises:
        ModelError: the family is not known.
    """
    return arch_of(config).heads_of(name)
