"""Patches: base and patch are the trained model, taken off it is the base again, and nothing else is possible."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from killed import killed_in_rename
from safetensors.torch import load_file, save_file
from tiny_export import INFO, relative_difference, reloaded, section, trained
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qaft.arch import arch_of
from qaft.errors import ExportError
from qaft.export import EXPORTERS, staging
from qaft.export.patch_file import TENSORS, load_patch
from qaft.export.patch_folder import apply_patch, revert_patch
from qaft.export.patch_state import STATE
from qaft.export.reload import load
from qaft.layers.attach import adapted_layers
from qaft.models.load import LoadedModel
from qaft.models.online import put_online
from qaft.quant import TokenQuantizer
from qaft.quant.compressed_tokens import CompressedTensorsTokens
from qaft.sections import GridSection, QatSection

SELECTED = ("q_proj", "v_proj", "down_proj")
GRIDS = {
    "int4, groups": GridSection(bits=4, group_size=32),
    "int4, groups, zero points": GridSection(bits=4, group_size=32, symmetric=False),
    "int4, channels": GridSection(bits=4, group_size=None),
    "int8, channels, zero points": GridSection(bits=8, group_size=None, symmetric=False),
    "int8, groups": GridSection(bits=8, group_size=32),
    "int8, channels": GridSection(bits=8, group_size=None),
}
ON_GRID = {4: "int4", 8: "int8_group"}
"""Storage of frozen layers on the grid of the trained ones, by its bits."""


@dataclass(frozen=True)
class Shared:
    """A packed base, a run on it, its full export and its patch."""

    loaded: LoadedModel
    base: Path
    full: Path
    patch: Path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


@torch.no_grad()
def at_start(loaded: LoadedModel) -> None:
    for layer in adapted_layers(loaded.model).values():
        for parameter in layer.update.parameters():
            parameter.zero_()


@pytest.fixture(scope="module")
def shared(checkpoint: Callable[..., Path], tmp_path_factory: Any) -> Callable[..., Shared]:
    made: dict[tuple[Any, ...], Shared] = {}

    def make(
        grid: str = "int4, groups",
        storage: str = "the grid's",
        update: str = "rows",
        size: float = 0.3,
        inputs: TokenQuantizer | None = None,
    ) -> Shared:
        key = (grid, storage, update, size, str(inputs))
        if key not in made:
            folder = tmp_path_factory.mktemp("patch")
            qat = QatSection(weights=GRIDS[grid], rotation="none" if storage == "bf16" else "hadamard")
            held = storage if storage == "bf16" else ON_GRID[GRIDS[grid].bits]
            loaded = trained(
                checkpoint(), update, qat=qat, storage=held, select=lambda n: n.endswith(SELECTED), size=size
            )
            if inputs is not None:
                put_online(loaded.model, arch_of(loaded.source.config), None, inputs=inputs, cache=None)
            pack = section("compressed-tensors", max_shard_gb=1e-5)
            EXPORTERS["compressed-tensors"](loaded, pack, folder / "full", INFO)
            EXPORTERS["patch"](loaded, section("patch"), folder / "tune", INFO)
            kept = {n: p.clone() for n, p in loaded.model.named_parameters() if p.requires_grad}
            at_start(loaded)
            EXPORTERS["compressed-tensors"](loaded, pack, folder / "base", INFO)
            loaded.model.load_state_dict(kept, strict=False)
            made[key] = Shared(loaded, folder / "base", folder / "full", folder / "tune")
        return made[key]

    return make


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


@pytest.mark.parametrize("update", ["rows", "sift"])
@pytest.mark.parametrize("storage", ["bf16", "the grid's"])
@pytest.mark.parametrize("grid", GRIDS)
def test_base_and_patch_are_the_full_export_tensor_by_tensor_and_back(
    shared: Any, tmp_path: Path, grid: str, storage: str, update: str
) -> None:
    require_there_and_back(shared(grid, storage, update), tmp_path)


@pytest.mark.parametrize("storage", ["bf16", "the grid's"])
@pytest.mark.parametrize(
    ("grid", "inputs"),
    [
        ("int8, channels", TokenQuantizer(bits=8)),
        ("int8, channels", CompressedTensorsTokens(bits=8)),
        ("int8, groups", TokenQuantizer(bits=8)),
        ("int4, channels", TokenQuantizer(bits=8)),
        ("int4, groups", TokenQuantizer(bits=8)),
        ("int4, groups", TokenQuantizer(bits=4)),
    ],
)
def test_every_scheme_with_quantized_inputs_is_patched_there_and_back(
    shared: Any, tmp_path: Path, grid: str, inputs: TokenQuantizer, storage: str
) -> None:
    made = shared(grid, storage, "rows", inputs=inputs)
    parts = {name.rpartition(".")[2] for name in load_file(made.patch / TENSORS)}
    assert ("weight" in parts) is (grid == "int8, channels") is ("weight_packed" not in parts)
    require_there_and_back(made, tmp_path)


def require_there_and_back(made: Shared, tmp_path: Path) -> None:
    base, before = copied(made.base, tmp_path / "base"), files(made.base)
    apply_patch(load_patch(made.patch), base, None)
    applied, full = files(base), files(made.full)
    assert applied.keys() - full.keys() == {STATE}
    assert {n for n in full if applied[n] != full[n]} <= {"README.md", "qaft_export.json"}
    assert any(applied[n] != before[n] for n in before if n.endswith(".safetensors"))
    revert_patch(load_patch(made.patch), base, None)
    assert files(base) == before


def test_a_patched_base_loads_as_the_trained_function(shared: Any, tmp_path: Path) -> None:
    made = shared()
    apply_patch(load_patch(made.patch), made.base, tmp_path / "out")
    assert relative_difference(made.loaded.model, reloaded(tmp_path / "out")) <= 1e-5


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_rows_trained_through_a_code_book_lie_on_a_base_that_bitsandbytes_has_quantized(
    checkpoint: Any, tmp_path: Path, kind: str
) -> None:
    base = tmp_path / "base"
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.bfloat16)
    quantized = AutoModelForCausalLM.from_pretrained(checkpoint(), quantization_config=how, dtype=torch.bfloat16)
    quantized.save_pretrained(base)
    before = files(base)
    qat = QatSection(weights=GridSection.model_validate({"kind": kind}), rotation="none")
    loaded = trained(checkpoint(), "rows", qat=qat, storage=kind, select=lambda n: n.endswith("q_proj"), size=0.3)
    EXPORTERS["patch"](loaded, section("patch"), tmp_path / "tune", INFO)
    apply_patch(load_patch(tmp_path / "tune"), base, None)
    model = AutoModelForCausalLM.from_pretrained(base)
    for name, layer in adapted_layers(loaded.model).items():
        stored: Any = model.get_submodule(name).weight
        assert torch.equal(dequantize_4bit(stored.data, stored.quant_state), layer.weight().detach())
    assert files(base) != before
    revert_patch(load_patch(tmp_path / "tune"), base, None)
    assert files(base) == before


def test_a_base_whose_zeros_have_the_other_code_of_fp4_is_refused_although_its_weights_are_equal(
    checkpoint: Any, tmp_path: Path
) -> None:
    """bitsandbytes gives code 8 to what rounds to zero from above on a CPU, and from below on a GPU."""
    qat = QatSection(weights=GridSection.model_validate({"kind": "fp4"}), rotation="none")
    loaded = trained(checkpoint(), "rows", qat=qat, storage="fp4", select=lambda n: n.endswith("q_proj"), size=0.3)
    EXPORTERS["patch"](loaded, section("patch"), tmp_path / "tune", INFO)
    at_start(loaded)
    EXPORTERS["bnb"](loaded, section("bnb"), tmp_path / "base", INFO)
    apply_patch(load_patch(tmp_path / "tune"), tmp_path / "base", tmp_path / "out")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    # A layer that the patch does not touch.
    name = "model.layers.1.mlp.down_proj.weight"
    swapped = stored[name].clone()
    for half in (0x0F, 0xF0):
        zeros = (stored[name] & half & 0x77) == 0
        swapped = torch.where(zeros, swapped ^ (half & 0x88), swapped)
    assert not torch.equal(swapped, stored[name])
    other = copied(tmp_path / "base", tmp_path / "other")
    save_file({**stored, name: swapped}, other / "model.safetensors", {"format": "pt"})
    ours, theirs = (load(str(folder), "cpu", None, None) for folder in (tmp_path / "base", other))
    assert relative_difference(ours, theirs) == 0
    before = files(other)
    with pytest.raises(ExportError, match=rf"not the base of tune: 1 tensors differ in their bytes, {name}; give"):
        apply_patch(load_patch(tmp_path / "tune"), other, None)
    assert files(other) == before


def test_only_touched_rows_are_written(shared: Any) -> None:
    made = shared()
    in_bytes, rows, groups = {}, 4, 32
    for name, layer in adapted_layers(made.loaded.model).items():
        row = layer.in_features // 2 + 2 * layer.in_features // groups
        in_bytes[name] = 4 * rows + 2 * rows * row
    stored = load_file(made.patch / TENSORS)
    assert sum(t.nbytes for t in stored.values()) == sum(in_bytes.values())
    header = 8 + int.from_bytes((made.patch / TENSORS).read_bytes()[:8], "little")
    assert (made.patch / TENSORS).stat().st_size == header + sum(in_bytes.values())
    assert sorted(p.name for p in made.patch.iterdir()) == ["README.md", "patch.json", TENSORS, "qaft_export.json"]


def test_a_patch_is_put_on_once(shared: Any, tmp_path: Path) -> None:
    made = shared()
    apply_patch(load_patch(made.patch), made.base, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(ExportError, match="the patch tune is on it already; nothing was changed"):
        apply_patch(load_patch(made.patch), tmp_path / "out", None)
    assert files(tmp_path / "out") == before


def test_two_patches_of_the_same_rows_are_reported_with_the_rows(shared: Any, tmp_path: Path) -> None:
    made, other = shared(), shared(size=0.2)
    apply_patch(load_patch(made.patch), made.base, tmp_path / "out")
    with pytest.raises(ExportError, match=r"both change rows 0, 16, 32 and 1 more of .*down_proj; revert tune first"):
        apply_patch(load_patch(other.patch), tmp_path / "out", None)


def test_patches_of_different_layers_lie_on_one_base_and_come_off_in_any_order(checkpoint: Any, tmp_path: Path) -> None:
    qat = QatSection(weights=GRIDS["int4, groups, zero points"])
    for name in ("q_proj", "v_proj"):
        # Both layers have latents in both runs, so that the base is one.
        loaded = trained(
            checkpoint(), "rows", qat=qat, storage="int4", select=lambda n: n.endswith(("q_proj", "v_proj"))
        )
        with torch.no_grad():
            for layer_name, layer in adapted_layers(loaded.model).items():
                if not layer_name.endswith(name):
                    layer.update.rows = layer.update.rows[:0]
                    layer.update.row_delta.data = layer.update.row_delta.data[:0]
        EXPORTERS["patch"](loaded, section("patch"), tmp_path / name, INFO)
    at_start(loaded)
    EXPORTERS["compressed-tensors"](loaded, section("compressed-tensors"), tmp_path / "base", INFO)
    before = files(tmp_path / "base")
    first, second = load_patch(tmp_path / "q_proj"), load_patch(tmp_path / "v_proj")
    apply_patch(first, tmp_path / "base", None)
    apply_patch(second, tmp_path / "base", None)
    assert [p["name"] for p in json.loads((tmp_path / "base" / STATE).read_text())["patches"]] == ["q_proj", "v_proj"]
    revert_patch(first, tmp_path / "base", None)
    revert_patch(second, tmp_path / "base", None)
    assert files(tmp_path / "base") == before


def test_another_base_is_refused_and_left_alone(shared: Any, tmp_path: Path) -> None:
    made, other = shared(), shared("int4, groups", "the grid's", "rows", 0.2)
    patched = apply_patch(load_patch(other.patch), made.base, tmp_path / "patched")
    (patched / STATE).unlink()
    before = files(patched)
    with pytest.raises(
        ExportError, match=r"not the base of tune: \d+ tensors differ in their bytes, model\.layers\.0.*patch base"
    ):
        apply_patch(load_patch(made.patch), patched, None)
    assert files(patched) == before
    with pytest.raises(ExportError, match=r"tensors are missing"):
        apply_patch(load_patch(made.patch), shared("int4, groups", "bf16").base, None)


def test_what_is_not_on_a_folder_cannot_be_taken_off(shared: Any, tmp_path: Path) -> None:
    made = shared()
    with pytest.raises(ExportError, match=r"the patch tune is not on it \(patches on it: none\)"):
        revert_patch(load_patch(made.patch), made.base, tmp_path / "out")


def test_rows_that_were_changed_since_are_not_overwritten(shared: Any, tmp_path: Path) -> None:
    made = shared()
    folder = apply_patch(load_patch(made.patch), made.base, tmp_path / "out")
    state = (folder / STATE).read_bytes()
    shutil.rmtree(folder)
    copied(made.base, folder)
    (folder / STATE).write_bytes(state)
    with pytest.raises(ExportError, match="were changed after tune was put onto it"):
        revert_patch(load_patch(made.patch), folder, None)


@pytest.mark.parametrize("call", range(2))
def test_a_kill_between_two_renames_leaves_the_base_or_the_model(
    shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    made = shared()
    base, before = copied(made.base, tmp_path / "base"), files(made.base)
    killed_in_rename(monkeypatch, call, lambda: apply_patch(load_patch(made.patch), base, None))
    assert base.exists() is (call == 0)
    with pytest.warns(UserWarning, match="brought back|a killed export had left it"):
        with pytest.raises(ExportError, match="not on it"):
            revert_patch(load_patch(made.patch), base, None)
        assert files(base) == before
        apply_patch(load_patch(made.patch), base, None)
    assert weights(base).keys() == weights(made.full).keys()
    assert all(torch.equal(t, weights(made.full)[n]) for n, t in weights(base).items())


def test_a_full_disk_leaves_the_base_as_it_was(shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = shared()
    base = copied(made.base, tmp_path / "base")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        apply_patch(load_patch(made.patch), base, None)
    assert files(base) == files(made.base) and [p.name for p in tmp_path.iterdir()] == ["base"]


def test_shards_without_touched_rows_are_not_copied(shared: Any, tmp_path: Path) -> None:
    made = shared()
    base = copied(made.base, tmp_path / "base")
    inodes = {p.name: p.stat().st_ino for p in base.glob("*.safetensors")}
    apply_patch(load_patch(made.patch), base, None)
    kept = {p.name for p in base.glob("*.safetensors") if p.stat().st_ino == inodes[p.name]}
    changed = {n for n, data in files(base).items() if n.endswith("tensors") and data != (made.base / n).read_bytes()}
    assert len(inodes) > 3 and kept and changed and not kept & changed


def test_two_processes_do_not_change_one_folder(shared: Any, tmp_path: Path) -> None:
    made = shared()
    base = copied(made.base, tmp_path / "base")
    with staging._locked(base), pytest.raises(ExportError, match="another process is changing it"):
        apply_patch(load_patch(made.patch), base, None)


def test_a_damaged_patch_is_said_to_be_damaged(shared: Any, tmp_path: Path) -> None:
    folder = copied(shared().patch, tmp_path / "tune")
    with (folder / TENSORS).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ExportError, match="damaged"):
        load_patch(folder)
    with pytest.raises(ExportError, match="no patch"):
        load_patch(tmp_path)


@pytest.mark.parametrize(
    ("update", "grid", "message"),
    [
        ("columns", GRIDS["int4, groups"], r"changes every row.*`compressed-tensors` or `merged`"),
        ("lowrank", GRIDS["int4, groups"], r"LowRank changes every row"),
        ("rows", None, r"not trained through a grid.*`peft` or `merged`"),
        ("rows", GridSection.model_validate({"kind": "nvfp4"}), r"NVFP4; export `merged`"),
        ("rows", GridSection(bits=3, group_size=32), r"3-bit.*4 and 8 bits; export `merged`"),
    ],
)
def test_what_is_not_local_to_rows_is_refused(
    checkpoint: Any, tmp_path: Path, update: str, grid: Any, message: str
) -> None:
    qat = None if grid is None else QatSection(weights=grid, rotation="none")
    with pytest.raises(ExportError, match=message):
        EXPORTERS["patch"](trained(checkpoint(), update, qat=qat), section("patch"), tmp_path / "out", INFO)
