"""Exported checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qaft.sections.base import DTypeName, Section


class ExportSection(Section):
    """One exported checkpoint."""

    format: str
    out: str | None = Field(default=None, description="folder; default: <train.output>/export-<format>")
    force: bool = Field(default=False, description="write although the update does not survive requantization")
    dtype: DTypeName | None = Field(
        default=None, description="merged, gguf: dtype of weights that are not packed; default: model.dtype"
    )
    basis: Literal["fused", "original"] = Field(
        default="fused",
        description="merged only. fused: as trained; original: rotations and norms undone, exact to rounding",
    )
    profile: Literal["portable", "vllm"] = Field(
        default="portable",
        description="compressed-tensors only. portable: no online rotation, also read by transformers; vllm: R4 is "
        "written as a transform, which vLLM alone runs",
    )
    rank: int | None = Field(
        default=None, ge=1, description="peft only: cut a dense update to this rank, by its singular values"
    )
    max_shard_gb: float = Field(default=4.0, gt=0, description="GiB per safetensors file")
    verify: bool = Field(default=True, description="reload in a fresh process and compare before the export appears")
