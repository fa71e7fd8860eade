"""DeepSpeed configurations: what is shipped, what a file may say, and that nothing is left to a default."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qaft.errors import RecipeError
from qaft.recipe import Recipe, parse_recipe
from qaft.zero import LARGEST_BUCKET, builtin_names, engine_config, zero_config, zero_stage

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


def recipe(deepspeed: str, **sections: Any) -> Recipe:
    train = {"batch_size": 8, "grad_accumulation": 4, **sections.pop("train", {}), "deepspeed": deepspeed}
    return parse_recipe({"model": {"name": "m"}, "train": train, **sections})


def written(folder: Path, content: Any) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def leaves(config: Mapping[str, Any]) -> Iterator[Any]:
    for value in config.values():
        yield from leaves(value) if isinstance(value, Mapping) else (value,)


def test_the_shipped_names() -> None:
    assert builtin_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_filled_configuration_holds_the_recipe_and_no_auto(name: str) -> None:
    config = engine_config(recipe(name), world_size=2, num_trainable=1000)
    assert config["train_batch_size"] == 32
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 1.0
    assert "auto" not in list(leaves(config))
    assert config["zero_optimization"].get("reduce_bucket_size", 1000) == 1000


def test_no_clipping_is_written_as_zero_because_a_missing_key_means_one() -> None:
    config = engine_config(recipe("zero2", optim={"clip": None}), world_size=1, num_trainable=1)
    assert config["gradient_clipping"] == 0.0


def test_a_bucket_is_not_larger_than_what_is_trained_nor_than_its_limit() -> None:
    config = engine_config(recipe("zero2"), world_size=1, num_trainable=10**10)
    assert config["zero_optimization"]["reduce_bucket_size"] == LARGEST_BUCKET


def test_a_file_is_laid_over_the_built_in_of_its_stage(tmp_path: Path) -> None:
    section = {"stage": 3, "stage3_prefetch_bucket_size": 7, "reduce_bucket_size": "auto", "offload_param": {"device": "cpu"}}  # fmt: skip
    path = written(tmp_path, {"zero_optimization": section, "bf16": {"enabled": "auto"}, "fp16": {"enabled": False}})
    config = engine_config(recipe(path), world_size=1, num_trainable=5)
    expected = engine_config(recipe("zero3"), world_size=1, num_trainable=5)
    expected["zero_optimization"] |= {
        "stage3_prefetch_bucket_size": 7,
        "offload_param": zero_config("zero3_offload")["zero_optimization"]["offload_param"],
    }
    assert config == expected


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ({"train_batch_size": 16}, ["train_batch_size=16", "train.batch_size=8 x train.grad_accumulation=4", "32"]),
        ({"train_micro_batch_size_per_gpu": 8}, ["train_micro_batch_size_per_gpu=8", "over 2 processes", "makes it 4"]),
        ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps=2", "train.grad_accumulation=4"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping=0.5", "optim.clip=1.0", '"auto"']),
        ({"zero_force_ds_cpu_optimizer": True}, ["zero_force_ds_cpu_optimizer=True", "the recipe's own optimizer"]),
        ({"optimizer": {"type": "AdamW"}}, ["'optimizer'", "per-group learning rates", "optim.name"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "learning rate of every group", "optim.schedule"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=True", "round the trained parameters", "model.dtype"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled=True", "remove the section"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast.enabled=True"]),
        ({"zero_optimization": {"stage": 4}}, ["stage=4", "one of 0, 1, 2, 3"]),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer", "stage 1"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["offload_param", "stage 3"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["device='nvme'", "none or cpu"]),
        ({"aio": {"block_size": "auto"}}, ["aio.block_size", "nothing in the recipe decides"]),
        ([], ["JSON object"]),
    ],
)
def test_what_the_recipe_decides_cannot_be_decided_again(tmp_path: Path, content: Any, fragments: list[str]) -> None:
    path = written(tmp_path, content)
    with pytest.raises(RecipeError) as error:
        engine_config(recipe(path), world_size=2, num_trainable=10)
    for fragment in (str(tmp_path), *fragments):
        assert fragment in str(error.value)


def test_values_that_repeat_the_recipe_are_no_contradiction(tmp_path: Path) -> None:
    path = written(tmp_path, {"gradient_clipping": 1, "train_batch_size": 32})
    assert engine_config(recipe(path), world_size=1, num_trainable=1)["gradient_clipping"] == 1.0


def test_a_name_that_is_neither_built_in_nor_a_file_is_answered_with_the_names() -> None:
    with pytest.raises(RecipeError, match=r"no such file, and not one of zero0, .*; did you mean 'zero3'"):
        zero_config("zero33")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{", encoding="utf-8")
    with pytest.raises(RecipeError, match=re.escape(str(tmp_path / "ds.json"))):
        zero_config(str(tmp_path / "ds.json"))


@pytest.mark.parametrize(("name", "stage"), [(None, None), ("missing.json", None), ("zero0", 0), ("zero3_offload", 3)])
def test_stages(name: str | None, stage: int | None) -> None:
    assert zero_stage(name) == stage


def test_an_installed_wheel_finds_the_built_in_configurations(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("qaft", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", *build, str(source)], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
    code = "import qaft.zero as z; print(z.__file__, *z.builtin_names())"
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert found.stdout.split() == [str(tmp_path / "installed" / "qaft" / "zero.py"), *NAMES]
