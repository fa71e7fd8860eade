"""The sections of a recipe as frozen types: unknown keys are refused, and nothing here imports torch.

Sections with a ``kind`` (``update``, ``select``, ``gradient``, ``regularize``) hold free options that are checked
against the constructor of the registered class when the run is built, so that an option is declared and documented
once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Storage = Literal["bf16", "fp16", "fp32", "nf4", "fp4", "int8", "int4", "int8_group"]
"""How frozen linear layers are held. ``int4`` / ``int8_group`` are affine groups in the compressed-tensors layout."""

DTypeName = Literal["bfloat16", "float16", "float32"]


class Section(BaseModel):
    """A part of the recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KindSection(BaseModel):
    """``{kind: name, **options}``; the options are checked against the constructor of the registered class."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: str

    @property
    def options(self) -> dict[str, Any]:
        """Return everything but ``kind``."""
        return dict(self.__pydantic_extra__ or {})


class ModelSection(Section):
    """The base model and how its frozen layers are stored."""

    name: str = Field(description="Hugging Face id, local folder, .gguf file, or run folder")
    storage: Storage = Field(default="bf16", description="storage of frozen linear layers")
    dtype: DTypeName = Field(
        default="bfloat16", description="dtype of computation and of everything that is not packed"
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


Ste = Literal["identity", "clamp", "trust"]
"""Where the straight-through gradient passes: everywhere, within the grid's range, or half a step beyond it too."""

_BLOCK_SIZES = {"nf4": 64, "q4_0": 32, "mxfp4": 32, "nvfp4": 16}
"""Weights per scale of the grids that come in blocks; only nf4 has other sizes too."""


class GridSection(Section):
    """A weight grid."""

    kind: Literal["int", "nf4", "q4_0", "mxfp4", "nvfp4"] = Field(
        default="int", description="int: affine; nf4: code book of bitsandbytes; q4_0: GGUF; mxfp4, nvfp4: e2m1 floats"
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
        if self.kind in _BLOCK_SIZES and self.kind != "nf4" and self.group_size != _BLOCK_SIZES[self.kind]:
            raise ValueError(f"group_size={self.group_size} must be {_BLOCK_SIZES[self.kind]} for kind {self.kind}")
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
    rotated: RotatedSection | None = Field(default=None, description="the rotations in use; leave out to have them set")


class OptimSection(Section):
    """Optimizer, learning rates and their schedule."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw", "sgd", "adafactor"] = "adamw"
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1, description="sgd only")
    lr_scale: dict[str, float] = Field(default_factory=dict, description="name pattern -> factor on lr")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0, description="below 1: fraction of train.steps; otherwise steps")
    min_lr: float = Field(default=0.0, ge=0, le=1, description="floor of the schedule as a fraction of lr")
    clip: float | None = Field(default=1.0, gt=0, description="maximum gradient norm; null for none")


class ClassificationSection(Section):
    """A classification set as text: the options are scored as completions of one prompt."""

    prompt: str = Field(description="format string over the row's fields, e.g. '{sentence} It was'")
    label: str = Field(default="label", description="field that holds the class")
    verbalizers: dict[str, str] = Field(description="class -> the text to be generated")

    @field_validator("verbalizers", mode="before")
    @classmethod
    def _classes_may_be_written_as_numbers(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {class_name(k): v for k, v in value.items()}
        return value

    @field_validator("verbalizers")
    @classmethod
    def _options_differ(cls, value: dict[str, str]) -> dict[str, str]:
        if len(value) < 2 or len(set(value.values())) < len(value) or "" in value.values():
            raise ValueError("must map at least two classes to texts that differ and are not empty")
        return value


def class_name(value: Any) -> str:
    """Return the name of a class as verbalizers spell it: ``1``, ``1.0`` -> "1"; ``True`` -> "true"; "a" -> "a"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


class DataSection(Section):
    """Training and validation data."""

    train: str | None = Field(default=None, description="file (.jsonl .json .csv .parquet), hub id, or id:config")
    valid: str | None = None
    format: Literal["auto", "messages", "prompt_completion", "instruction", "sharegpt", "text", "classification"] = (
        "auto"
    )
    max_length: int = Field(default=1024, ge=8, description="tokens per sequence")
    packing: bool = Field(default=True, description="several samples in one row, without attention between them")
    chat_template: Literal["auto", "tokenizer", "plain"] = Field(
        default="auto",
        description="tokenizer: its chat template; plain: none; auto: the template when the tokenizer has one, but "
        "never for text and classification, whose rows are already the whole layout",
    )
    train_on: Literal["completion", "all"] = Field(default="completion", description="which tokens carry loss")
    train_split: str = "train"
    valid_split: str = "validation"
    limit: int | None = Field(default=None, ge=1, description="use only the first rows")
    columns: dict[str, str] = Field(
        default_factory=dict, description="field the format expects -> field of the file, e.g. {prompt: question}"
    )
    on_long: Literal["truncate", "split", "drop", "error"] = Field(
        default="truncate", description="samples above max_length; split: consecutive windows (format text only)"
    )
    classification: ClassificationSection | None = None


class TrainSection(Section):
    """Length, batches, checkpoints and outputs of the run."""

    steps: int = Field(default=200, ge=1, description="optimizer steps")
    batch_size: int = Field(default=8, ge=1, description="rows per micro-batch, over all processes")
    grad_accumulation: int = Field(default=1, ge=1, description="micro-batches per optimizer step")
    seed: int = 0
    eval_every: int | None = Field(default=None, ge=1, description="steps between evaluations; null: only at the end")
    eval_batches: int | None = Field(default=None, ge=1, description="evaluate on at most this many batches")
    save_every: int | None = Field(default=None, ge=1, description="steps between checkpoints; null: only at the end")
    keep: int = Field(default=2, ge=1, description="checkpoints to keep")
    log_every: int = Field(default=1, ge=1)
    resume: bool = Field(default=False, description="continue from the last good checkpoint in output")
    output: str = "runs/default"
    gradient_checkpointing: bool = False
    param_dtype: DTypeName = Field(default="float32", description="dtype of the trainable parameters")
    deepspeed: str | None = Field(
        default=None,
        description="DeepSpeed: zero0 to zero3, zero2_offload, zero3_offload, or a JSON file; null: without",
    )
    report_to: tuple[str, ...] = Field(default=(), description="accelerate trackers: tensorboard, wandb, trackio, ...")


class ExportSection(Section):
    """One exported checkpoint."""

    format: str
    out: str | None = Field(default=None, description="folder; default: <train.output>/export-<format>")
    force: bool = Field(default=False, description="write although the update does not survive requantization")
    dtype: DTypeName | None = Field(default=None, description="dtype of merged weights; default: model.dtype")
    basis: Literal["fused", "original"] = Field(
        default="fused",
        description="merged only. fused: as trained; original: rotations and norms undone, exact to rounding",
    )
    max_shard_gb: float = Field(default=4.0, gt=0, description="GiB per safetensors file")
    verify: bool = Field(default=True, description="reload in a fresh process and compare before the export appears")
