"""The base model, which of its layers are adapted, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qaft.sections.base import DTypeName, KindSection, Section

Storage = Literal["bf16", "fp16", "fp32", "nf4", "fp4", "int8", "int4", "int8_group"]
"""How frozen linear layers are held. ``int4`` / ``int8_group`` are affine groups in the compressed-tensors layout."""


class ModelSection(Section):
    """The base model and how its frozen layers are stored."""

    name: str = Field(description="Hugging Face id, local folder, .gguf file, or run folder")
    storage: Storage = Field(default="bf16", description="storage of frozen linear layers")
    dtype: DTypeName = Field(
        default="bfloat16", description="dtype of computation and of everything that is not packed"
    )
    adapter: str | None = Field(
        default=None, description="folder of a PEFT LoRA on this model: where update lowrank starts"
    )
    double_quant: bool = Field(
        default=False, description="nf4/fp4 only: quantize the block scales too (never on trained layers)"
    )
    group_size: int | None = Field(
        default=128,
        description="int4, int8_group without qat: weights per scale; null or -1: per channel (qat brings its own)",
    )
    revision: str | None = Field(default=None, description="git revision on the hub")
    trust_remote_code: bool = Field(
        default=False, description="run Python code that the checkpoint ships; off unless you say so"
    )
    attention: str = Field(default="sdpa", description="transformers attn_implementation")


class SelectSection(KindSection):
    """Which linear layers are adapted."""

    kind: str = "patterns"


class UpdateSection(KindSection):
    """What is trained in each adapted layer."""

    kind: str = "lowrank"
