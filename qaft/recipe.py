"""The recipe file as frozen types: unknown keys are refused, and nothing here imports torch.

A recipe is YAML (safe loader: configuration never executes code). Sections with a ``kind`` (``update``, ``select``,
``gradient``, ``regularize``) hold free options that are checked against the constructor of the registered class when
the run is built, so that an option is declared and documented once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qaft.errors import RecipeError
from qaft.registry import suggest

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


class GridSection(Section):
    """A weight grid."""

    kind: Literal["int", "nf4"] = Field(default="int", description="int: affine; nf4: the bitsandbytes code book")
    bits: int = Field(default=4, ge=2, le=8, description="bits per weight (int grids)")
    group_size: int | None = Field(
        default=128, description="weights per scale along the input; null or -1: per output channel"
    )
    symmetric: bool = Field(default=True, description="int grids: no zero point")

    @model_validator(mode="before")
    @classmethod
    def _code_book_has_blocks_of_64(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("kind") == "nf4" and "group_size" not in data:
            return {**data, "group_size": 64}
        return data

    @model_validator(mode="after")
    def _group_size_is_possible(self) -> GridSection:
        if self.group_size is not None and self.group_size != -1 and self.group_size < 8:
            raise ValueError(f"group_size={self.group_size} must be null, -1 (per channel) or at least 8")
        if self.kind == "nf4" and self.bits != 4:
            raise ValueError(f"bits={self.bits} must be 4 for kind nf4")
        return self


class QatSection(Section):
    """Fake quantization of the adapted layers; leave the section out for none."""

    weights: GridSection = Field(default_factory=GridSection)
    rotation: str = Field(default="hadamard", description="none | hadamard: fused R1 and R2")
    rotation_seed: int = Field(default=0, description="seed of the random signs of the rotations")


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


class Recipe(Section):
    """Everything that defines a run."""

    model: ModelSection
    select: SelectSection = Field(default_factory=SelectSection)
    update: UpdateSection = Field(default_factory=UpdateSection)
    qat: QatSection | None = None
    gradient: KindSection = Field(default_factory=lambda: KindSection(kind="backprop"))
    regularize: tuple[KindSection, ...] = ()
    optim: OptimSection = Field(default_factory=OptimSection)
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
    export: tuple[ExportSection, ...] = ()

    def dump(self) -> dict[str, Any]:
        """Return the resolved recipe as plain YAML-able values."""
        return self.model_dump(mode="json")


def _describe(error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        given = item.get("input")
        if item["type"] == "extra_forbidden":
            section: Any = Recipe
            for part in item["loc"][:-1]:
                field = getattr(section, "model_fields", {}).get(part)
                section = _section_class(field.annotation) if field else None
            allowed = sorted(getattr(section, "model_fields", {}))
            key = str(item["loc"][-1])
            lines.append(f"{path} is not a key: allowed here: {', '.join(allowed)}{suggest(key, allowed)}")
        elif item["type"] == "missing":
            lines.append(f"{path} is required")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{path}={given!r}: {message[0].lower()}{message[1:]}")
    return f"{source}: " + "; ".join(lines)


def _section_class(annotation: Any) -> Any:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split ``train.lr=1e-4`` or ``--train.lr=1e-4`` into a key path and a YAML value.

    Raises:
        RecipeError: there is no ``=``, or the value is not YAML.
    """
    key, separator, value = text.lstrip("-").partition("=")
    if not separator or not key:
        raise RecipeError(f"override {text!r} must look like section.key=value")
    try:
        parsed = yaml.safe_load(value) if value else None
    except yaml.YAMLError as error:
        raise RecipeError(f"override {text!r}: the value is not YAML: {error}") from error
    return key.split("."), _number(parsed)


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 (no dot) as a string; every user means the number.
    if isinstance(value, str):
        try:
            return float(value) if any(c in value for c in ".eE") and value[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return _number(value)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of ``raw`` with each ``a.b=v`` set; intermediate sections are created.

    Raises:
        RecipeError: an override is malformed or walks through a value that is no section.
    """
    result = json.loads(json.dumps(raw))
    for text in overrides:
        path, value = parse_override(text)
        node: Any = result
        for position, part in enumerate(path[:-1]):
            if isinstance(node, list):
                node = node[_index(part, node, text)]
                continue
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, (dict, list)):
                raise RecipeError(f"override {text!r}: {'.'.join(path[: position + 1])} is {node!r}, not a section")
        if isinstance(node, list):
            node[_index(path[-1], node, text)] = value
        else:
            node[path[-1]] = value
    return result


def _index(part: str, items: list[Any], text: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise RecipeError(f"override {text!r}: {part!r} must be an index below {len(items)}")
    return int(part)


def parse_recipe(raw: Any, *, source: str = "recipe") -> Recipe:
    """Validate plain values as a Recipe.

    Raises:
        RecipeError: unknown key, wrong type or impossible value; the message names each key path.
        IncompatibleError: two choices exclude each other.
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"{source}: must be a mapping with the sections {', '.join(Recipe.model_fields)}")
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_describe(error, source)) from error
    from qaft.compat import check_compatible

    check_compatible(recipe)
    return recipe


def recipe_path(path: str | Path) -> Path:
    """Return the recipe file for a path that is a recipe or a run folder.

    Raises:
        RecipeError: there is no such file, or the folder is no run folder.
    """
    path = Path(path)
    if path.is_dir():
        inner = path / RUN_RECIPE
        if not inner.is_file():
            raise RecipeError(f"{path}: not a run folder (no {RUN_RECIPE}); give a recipe file or a run folder")
        return inner
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe; give a YAML file or a run folder")
    return path


RUN_RECIPE = "qaft.yaml"
"""Name of the resolved recipe inside a run folder."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file (or the resolved recipe of a run folder) and apply ``key=value`` overrides.

    Raises:
        RecipeError: missing file, broken YAML, unknown key, wrong type or impossible value.
    """
    file = recipe_path(path)
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not valid YAML: {error}") from error
    return parse_recipe(apply_overrides(_numbers(raw or {}), overrides), source=str(file))


def save_recipe(recipe: Recipe, folder: Path) -> Path:
    """Write the resolved recipe into a run folder and return its path."""
    path = folder / RUN_RECIPE
    path.write_text(yaml.safe_dump(recipe.dump(), sort_keys=False), encoding="utf-8")
    return path
