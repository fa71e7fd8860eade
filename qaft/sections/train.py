"""Optimizer, length and outputs of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qaft.sections.base import DTypeName, Section


class OptimSection(Section):
    """Optimizer, learning rates and their schedule."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw", "sgd", "adafactor", "multiplicative"] = (
        "adamw"
    )
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1, description="sgd only")
    inner: float = Field(
        default=1.0, gt=0, description="multiplicative only: gain inside the tanh of the relative step"
    )
    additive: float = Field(
        default=1.0, ge=0, description="multiplicative only: Adam's own step beside the relative one, times lr"
    )
    lr_scale: dict[str, float] = Field(default_factory=dict, description="name pattern -> factor on lr")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0, description="below 1: fraction of train.steps; otherwise steps")
    min_lr: float = Field(default=0.0, ge=0, le=1, description="floor of the schedule as a fraction of lr")
    clip: float | None = Field(default=1.0, gt=0, description="maximum gradient norm; null for none")


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
