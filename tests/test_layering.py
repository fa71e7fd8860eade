"""Who may import whom: the layers of the package, and the one importer of each heavy dependency."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qaft"
FILES = sorted(PACKAGE.rglob("*.py"))

# An importer may reach packages of a lower level only; those of one level are independent of each other.
LEVELS = [
    {"__main__"},
    {"cli", "quickstart"},
    {"commands"},
    {"training"},
    {"build", "plan"},
    {"rotations", "choices", "reselection", "ties"},
    {"train", "export", "selection", "data", "regularizers", "evaluate"},
    {"models"},
    {"layers"},
    {"updates", "quant", "rotation", "bases"},
    {"gradients", "arch"},
    {"recipe", "compat", "zero"},
    {"sections"},
    {"distributed"},
    {"registry", "ranks", "tensor_file", "philox", "native"},
    {"errors", "__init__"},
]
LEVEL = {name: depth for depth, names in enumerate(LEVELS) for name in names}

# Siblings that may be used all the same, each with its reason.
ALLOWED = {
    ("updates", "bases"),  # an update is a map of the frozen map: it needs its type
    ("bases", "quant"),  # a packed base holds a grid's codes
    ("rotation", "arch"),
    ("reselection", "rotations"),  # it measures again
    ("recipe", "compat"),  # a recipe is checked when it is read
    ("compat", "recipe"),  # types only
    ("compat", "zero"),  # a configuration names its stage
    ("zero", "recipe"),  # types only
    ("export", "evaluate"),  # an export is verified by comparing models
    ("evaluate", "data"),
    ("train", "gradients"),
    ("train", "regularizers"),  # the loss module runs the terms that compare passes
}

HEAVY = {
    "deepspeed": {"train/deepspeed.py"},
    "bitsandbytes": {"bases/bnb.py", "bases/bnb_layout.py", "train/optimizers.py"},
    "compressed_tensors": {"export/"},
    "accelerate": {"train/engine.py", "train/trackers.py"},
    "matplotlib": {"commands/rotation_map.py", "commands/report_plot.py"},
    "datasets": {"data/sources.py"},
    "triton": {"native/triton_", "quant/triton_", "rotation/triton_"},
    "peft": set(),
    "gguf": {"export/gguf"},
    "transformers": {
        "models/",
        "data/",
        "arch/",
        "export/",
        "evaluate/",
        "build.py",
        "rotations.py",
        "commands/",
        "quickstart/",
    },
}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    here = part_of(path)
    for name in imports(path):
        if not name.startswith("qaft."):
            continue
        there = name.split(".")[1]
        if there != here and (here, there) not in ALLOWED:
            assert LEVEL[there] > LEVEL[here], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_dependencies_have_one_importer(path: Path) -> None:
    relative = str(path.relative_to(PACKAGE))
    for name in imports(path):
        allowed = HEAVY.get(name.split(".")[0])
        assert allowed is None or any(relative.startswith(place) for place in allowed), f"{relative} imports {name}"


@pytest.mark.parametrize("folder", ["updates", "gradients"])
def test_methods_do_not_know_each_other(folder: str) -> None:
    shared = {
        "updates": {
            "base",
            "block_product",
            "choose",
            "entries",
            "factors",
            "features_first",
            "group_shuffle",
            "scaling",
            "shared_input",
            "sparse_product",
        },
        "gradients": {"base", "blocks", "epsilon", "projection", "two_point"},
    }[folder]
    for path in (PACKAGE / folder).glob("*.py"):
        if path.stem == "__init__":
            continue
        for name in imports(path):
            if name.startswith(f"qaft.{folder}."):
                assert name.split(".")[2] in shared, f"{path.name} imports {name}"


def test_no_module_is_a_drawer() -> None:
    assert not {p.stem for p in FILES} & {"utils", "helpers", "common", "misc"}


@pytest.mark.parametrize("module", ["qaft.sections", "qaft.recipe", "qaft.cli", "qaft.compat"])
def test_recipes_and_help_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_has_a_docstring() -> None:
    missing = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.stem != "__init__" and not ast.get_docstring(tree):
            missing.append(str(path.relative_to(ROOT)))
    assert not missing
