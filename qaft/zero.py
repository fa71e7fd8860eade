"""The DeepSpeed configuration of a run: a built-in name or a file, over the built-in of its stage, ``auto`` filled.

Nothing is left to a default of DeepSpeed: a key that the file leaves out, or sets to ``"auto"``, has the value of the
recipe, else the one of ``configs/deepspeed/zero<stage>.json``. (Its own default for ``gradient_clipping`` is 1.0, so
that a file without the key would clip a run that asked for no clipping.)

What the recipe decides cannot be decided again:

- ``optimizer`` and ``scheduler`` would replace ours, and with it the learning rates of the groups (``optim.lr_scale``).
- ``fp16``, ``bf16`` and autocast would round the trained fp32 parameters, or override the places that compute in fp32
  on purpose; the frozen model already is in ``model.dtype``. So DeepSpeed is told of fp32 parameters only.
- Adam for offloaded state is torch's: its fused CPU kernel is vectorized, needs no compiler, and takes the same steps
  as without offload (``zero_force_ds_cpu_optimizer: false``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaft.errors import RecipeError
from qaft.registry import suggest

if TYPE_CHECKING:
    from qaft.recipe import Recipe

AUTO = "auto"
STAGES = (0, 1, 2, 3)
LARGEST_BUCKET = 50_000_000
"""Gradients reduced at once, in parameters: 200 MB in fp32. DeepSpeed allocates the whole bucket, needed or not."""

_FOLDER = Path(__file__).parent / "configs" / "deepspeed"

_NOT_THEIRS: Mapping[str, str] = {
    "optimizer": "it would replace the recipe's optimizer and erase its per-group learning rates; set optim.name",
    "scheduler": "it would overwrite the learning rate of every group; set optim.schedule and optim.warmup",
    "elasticity": "it would change the batch size; set train.batch_size",
    "tensor_parallel": "the frozen layers cannot be split",
}
_SWITCHES: Mapping[str, str] = {
    "fp16": "the trained parameters stay in train.param_dtype, and fp16 models have their own loss scale",
    "bf16": "it would round the trained parameters to 16 bits; the frozen model already computes in model.dtype",
    "bfloat16": "it would round the trained parameters to 16 bits; the frozen model already computes in model.dtype",
    "amp": "the frozen model already computes in model.dtype",
    "torch_autocast": "it would override the places that compute in fp32 on purpose",
}


def builtin_names() -> list[str]:
    """Return the names of the configurations that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def zero_config(name_or_path: str) -> dict[str, Any]:
    """Return the configuration with every key present; values that the recipe decides are still ``"auto"``.

    Args:
        name_or_path: ``zero2``, ``zero3_offload``, ... or a JSON file of DeepSpeed.

    Raises:
        RecipeError: there is no such name or file, it is not JSON, or it decides what the recipe decides.
    """
    if name_or_path in builtin_names():
        return _read(_FOLDER / f"{name_or_path}.json")
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        names = builtin_names()
        raise RecipeError(
            f"train.deepspeed={name_or_path!r}: no such file, and not one of {', '.join(names)}"
            f"{suggest(name_or_path, names)}"
        )
    given = _read(path)
    _refuse_foreign(path, given)
    section = given.get("zero_optimization", {})
    stage = section.get("stage", 0)
    if stage not in STAGES:
        raise RecipeError(f"{path}: zero_optimization.stage={stage!r}: must be one of 0, 1, 2, 3")
    base = _read(_FOLDER / f"zero{stage}.json")
    offload = _read(_FOLDER / "zero3_offload.json")["zero_optimization"]
    for key in ("offload_optimizer", "offload_param"):
        if key in section:
            _check_offload(path, key, section[key], stage)
            base["zero_optimization"][key] = offload[key]
    return _laid_over(base, given)


def zero_stage(name_or_path: str | None) -> int | None:
    """Return the stage of a configuration; None for none, and for one that cannot be read (training says why)."""
    if name_or_path is None:
        return None
    try:
        return zero_config(name_or_path)["zero_optimization"]["stage"]
    except RecipeError:
        return None


def engine_config(recipe: Recipe, *, world_size: int, num_trainable: int) -> dict[str, Any]:
    """Return what ``deepspeed.initialize`` is given: nothing in it is ``"auto"``.

    Args:
        recipe: names the configuration in ``train.deepspeed`` and decides batches and clipping.
        world_size: processes.
        num_trainable: trained scalars; a gradient bucket is not larger.

    Raises:
        RecipeError: the configuration contradicts the recipe; see also ``zero_config``.
    """
    name = recipe.train.deepspeed
    assert name is not None
    config = zero_config(name)
    for key, (place, value) in _decided(recipe, world_size).items():
        if config[key] not in (AUTO, value):
            raise RecipeError(
                f"train.deepspeed={name}: {key}={config[key]} contradicts {place}, which makes it {value}; "
                f'write "auto" in the file, or change the recipe'
            )
        config[key] = value
    section = config["zero_optimization"]
    if section.get("reduce_bucket_size") == AUTO:
        section["reduce_bucket_size"] = min(num_trainable, LARGEST_BUCKET)
    left = [key for key, value in _flat(config) if value == AUTO]
    if left:
        raise RecipeError(f'train.deepspeed={name}: nothing in the recipe decides {", ".join(left)}; replace "auto"')
    return config


def _decided(recipe: Recipe, world_size: int) -> dict[str, tuple[str, float]]:
    train = recipe.train
    rows = train.batch_size * train.grad_accumulation
    return {
        "train_batch_size": (
            f"train.batch_size={train.batch_size} x train.grad_accumulation={train.grad_accumulation}",
            rows,
        ),
        "train_micro_batch_size_per_gpu": (
            f"train.batch_size={train.batch_size} over {world_size} processes",
            train.batch_size // world_size,
        ),
        "gradient_accumulation_steps": (
            f"train.grad_accumulation={train.grad_accumulation}",
            train.grad_accumulation,
        ),
        "gradient_clipping": (
            "optim.clip=null" if recipe.optim.clip is None else f"optim.clip={recipe.optim.clip}",
            recipe.optim.clip or 0.0,
        ),
        "zero_force_ds_cpu_optimizer": ("the recipe's own optimizer, which DeepSpeed would refuse otherwise", False),
        "zero_allow_untested_optimizer": ("the recipe's own optimizer, which DeepSpeed would refuse otherwise", True),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"train.deepspeed={path}: not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"train.deepspeed={path}: must be a JSON object with DeepSpeed's keys")
    return content


def _refuse_foreign(path: Path, given: dict[str, Any]) -> None:
    """Raise for sections that decide what the recipe decides, and drop those that are switched off."""
    for key, reason in _NOT_THEIRS.items():
        if key in given:
            raise RecipeError(f"{path}: remove the section {key!r}: {reason}")
    for key, reason in _SWITCHES.items():
        section = given.pop(key, {})
        if section.get("enabled", False) not in (False, AUTO):
            raise RecipeError(f"{path}: {key}.enabled={section['enabled']}: {reason}; remove the section")


def _check_offload(path: Path, key: str, section: Mapping[str, Any], stage: int) -> None:
    device = section.get("device", "none")
    if device not in ("none", "cpu"):
        raise RecipeError(f"{path}: zero_optimization.{key}.device={device!r}: must be none or cpu")
    least = {"offload_optimizer": 1, "offload_param": 3}[key]
    if device != "none" and stage < least:
        raise RecipeError(f"{path}: zero_optimization.{key} needs stage {least} or more, not {stage}")


def _laid_over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``given`` that are not ``"auto"``, section by section."""
    result = dict(base)
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping):
            result[key] = _laid_over(base[key], value)
        elif value != AUTO or key not in base:
            result[key] = value
    return result


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
