"""Fake quantization: the grids of weights, activations and cache, and the rotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from qaft.sections.base import Section

Ste = Literal["identity", "clamp", "trust"]
"""Where the straight-through gradient passes: everywhere, within the grid's range, or half a step beyond it too."""

CODE_BOOK_KINDS = ("nf4", "fp4")
"""Kinds of grids, and storages, that are code books of bitsandbytes."""

_BLOCK_SIZES = {**dict.fromkeys(CODE_BOOK_KINDS, 64), "q4_0": 32, "q8_0": 32, "mxfp4": 32, "nvfp4": 16}
"""Weights per scale of the grids that come in blocks; only code books have other sizes too."""


class GridSection(Section):
    """A weight grid."""

    kind: Literal["int", "nf4", "fp4", "q4_0", "q8_0", "mxfp4", "nvfp4"] = Field(
        default="int",
        description="int: affine; nf4, fp4: code books of bitsandbytes; q4_0, q8_0: GGUF; mxfp4, nvfp4: e2m1 floats",
    )
    bits: int = Field(default=4, ge=2, le=8, description="bits per weight (int grids)")
    group_size: int | None = Field(
        default=128, description="weights per scale along the input; null or -1: per output channel"
    )
    symmetric: bool = Field(default=True, description="int grids: no zero point")
    range: Literal["absmax", "mse", "rms", "signed_absmax"] = Field(
        default="absmax", description="int grids: how a group's scale follows from its weights"
    )
    clip: float = Field(default=1.0, gt=0, le=1, description="int grids, range absmax: the part of the range kept")
    ste: Ste = Field(default="clamp", description="where the gradient passes; matters where a grid clips")
    fused: bool = Field(default=False, description="int grids: compile the forward pass on CPUs, with the same codes")

    @model_validator(mode="before")
    @classmethod
    def _block_formats_have_their_own_group_size(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("kind") in _BLOCK_SIZES and "group_size" not in data:
            return {**data, "group_size": _BLOCK_SIZES[data["kind"]]}
        return data

    @model_validator(mode="after")
    def _group_size_is_possible(self) -> GridSection:
        if self.group_size is not None and self.group_size != -1 and self.group_size < 8:
            raise ValueError(f"group_size={self.group_size} must be null, -1 (per channel) or at least 8")
        size = None if self.kind in CODE_BOOK_KINDS else _BLOCK_SIZES.get(self.kind)
        if size is not None and self.group_size != size:
            raise ValueError(f"group_size={self.group_size} must be {size} for kind {self.kind}")
        return self

    @model_validator(mode="after")
    def _options_belong_to_the_kind(self) -> GridSection:
        if self.kind != "int":
            for key in ("bits", "symmetric", "range", "clip", "fused"):
                default = type(self).model_fields[key].default
                if getattr(self, key) != default:
                    raise ValueError(f"{key}={getattr(self, key)} must be {default} for kind {self.kind}")
        if self.clip < 1 and self.range != "absmax":
            raise ValueError(f"clip={self.clip} applies to range absmax: {self.range} has its own, leave clip out")
        if self.fused and self.range in ("mse", "rms"):
            raise ValueError(f"fused=true is for ranges absmax and signed_absmax, not {self.range}: leave fused out")
        if not self.symmetric and self.range in ("rms", "signed_absmax"):
            raise ValueError(f"range={self.range} is for symmetric grids: use absmax or mse, or set symmetric: true")
        return self


class ActivationSection(Section):
    """The grid of the inputs of layers with quantized weights: one scale per token, computed as it comes."""

    bits: Literal[4, 8] = Field(default=8, description="bits per value")
    symmetric: bool = Field(default=True, description="true: what servers run; false: with zero points, as RoSTE")
    clip: float = Field(default=1.0, gt=0, le=1, description="the part of a token's range kept; RoSTE: 0.95")
    ste: Ste = Field(default="identity", description="where the gradient passes; matters with a clip")
    function: Literal["vllm", "compressed-tensors"] = Field(
        default="vllm",
        description="vllm: scale max / q_max, as int kernels have it; compressed-tensors: max / (q_max + 1/2), as "
        "transformers has it when it runs the export",
    )

    @model_validator(mode="after")
    def _compressed_tensors_has_one_function(self) -> ActivationSection:
        if self.function == "compressed-tensors" and (not self.symmetric or self.clip < 1):
            raise ValueError(
                f"function=compressed-tensors is symmetric and does not clip: symmetric={self.symmetric} and "
                f"clip={self.clip} must be true and 1"
            )
        return self


class KVCacheSection(Section):
    """The grid of keys (after RoPE) and values: one scale per token and head."""

    function: Literal["vllm", "roste"] = Field(
        default="vllm", description="vllm: int4_per_token_head, which rotates by itself; roste: asymmetric, not rotated"
    )
    bits: int = Field(default=4, ge=2, le=8, description="bits per value; 4 for function vllm")
    clip: float = Field(default=1.0, gt=0, le=1, description="function roste: the part of the range kept")

    @model_validator(mode="after")
    def _vllm_has_one_int4_function(self) -> KVCacheSection:
        if self.function == "vllm" and self.bits != 4:
            raise ValueError(f"bits={self.bits} must be 4 for function vllm; function roste takes 2 to 8")
        if self.function == "vllm" and self.clip != 1:
            raise ValueError(f"clip={self.clip} must be 1 for function vllm, whose kernel does not clip")
        return self


class RotatedSection(Section):
    """The rotations that are in use; a run writes here what it has chosen, so that it is not chosen again."""

    residual: bool = Field(description="R1, the residual stream")
    values: tuple[int, ...] = Field(default=(), description="layers with R2, the value heads")
    attention: tuple[int, ...] = Field(default=(), description="layers with R3, queries and keys after RoPE")
    down: tuple[int, ...] = Field(default=(), description="layers with R4, the input of down")


class QatSection(Section):
    """Fake quantization of the adapted layers; leave the section out for none."""

    weights: GridSection = Field(default_factory=GridSection)
    activations: ActivationSection | None = Field(default=None, description="leave out for 16-bit activations")
    kv_cache: KVCacheSection | None = Field(default=None, description="leave out for a 16-bit KV cache")
    rotation: str = Field(
        default="hadamard",
        description="none | hadamard: all that the target runs | adaptive: of these, where the measured error is less",
    )
    rotation_seed: int = Field(default=0, description="seed of the random signs of the rotations")
    target: Literal["portable", "vllm", "simulation"] = Field(
        default="portable",
        description="what will run the export. portable: fused rotations; vllm: R4 too; simulation: all, no export",
    )
    calibration_tokens: int = Field(default=8192, ge=1, description="adaptive: tokens of data.train to measure on")
    reselect_every: int | None = Field(
        default=None,
        ge=1,
        description="adaptive: steps after which R2, R3 and R4 are chosen again, with the weights of that moment",
    )
    rotated: RotatedSection | None = Field(default=None, description="the rotations in use; leave out to have them set")
