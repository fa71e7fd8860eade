"""An exported folder is checked later, without the run: by its digests, and by what it answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file
from tiny_export import INFO, section, trained

from qaft.cli import main
from qaft.errors import DifferenceError, ExportError
from qaft.export import EXPORTERS, ExportInfo
from qaft.export.base import EXACT, FLIPPING, FLOOR_16BIT, UNBOUNDED, Bound
from qaft.export.card import STAMP
from qaft.export.check import check_export_folder
from qaft.export.digests import changes, digests
from qaft.export.fingerprint import FINGERPRINT, Deviation
from qaft.sections import GridSection, QatSection

INT4 = QatSection(weights=GridSection(bits=4, group_size=32))
INFO_WITH_MODEL = ExportInfo(recipe={"model": {"name": "tiny", "dtype": "bfloat16"}}, base="org/tiny")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, checkpoint: Any) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "packed"
    EXPORTERS["compressed-tensors"](
        trained(checkpoint(), qat=INT4), section("compressed-tensors", verify=True), folder, INFO
    )
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_a_copy_is_what_was_exported(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "README.md").write_text("my own words")
    found = check_export_folder(copy)
    assert found.format == "compressed-tensors"
    assert found.num_files == len(json.loads((copy / STAMP).read_text())["files"]) - 1
    assert found.deviation is not None and found.deviation.max_relative < 1e-5
    with pytest.raises(SystemExit) as end:
        main(["export", "--check-only", str(copy)])
    assert end.value.code == 0
    assert "logits of a fresh process" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["changed", "missing", "new"])
def test_a_file_that_is_not_the_exported_one_is_named(copy: Path, harm: str) -> None:
    name = {"changed": "model.safetensors", "missing": "config.json", "new": "extra.safetensors"}[harm]
    path = copy / name
    if harm == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes() if path.exists() else b"x")
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(DifferenceError, match=f"{name} (is|has) {harm}"):
        check_export_folder(copy)


def test_a_program_that_computes_something_else_is_found_although_no_file_has_changed(copy: Path) -> None:
    """Stands for another version of the client: weights that decode to something else, under correct digests."""
    weights = load_file(copy / "model.safetensors")
    name = next(n for n in weights if n.endswith("down_proj.weight_scale"))
    weights[name] = weights[name] * 1.5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    stamp = json.loads((copy / STAMP).read_text())
    stamp["files"] = digests(copy, without=STAMP)
    (copy / STAMP).write_text(json.dumps(stamp))
    with pytest.raises(DifferenceError, match="the reloaded export is not the trained model: max_relative"):
        check_export_folder(copy)


@pytest.mark.parametrize(
    ("device", "gap", "holds"), [("cpu", 5e-5, False), ("cuda", 5e-5, True), ("cuda", 5e-4, False)]
)
def test_answers_of_another_type_of_device_are_compared_with_room_for_its_sums(
    copy: Path, device: str, gap: float, holds: bool
) -> None:
    recorded = json.loads((copy / FINGERPRINT).read_text())
    assert recorded["device"] == "cpu"
    logits = [[[value * (1 + gap) for value in token] for token in prompt] for prompt in recorded["logits"]]
    (copy / FINGERPRINT).write_text(json.dumps({**recorded, "device": device, "logits": logits}))
    stamp = json.loads((copy / STAMP).read_text())
    (copy / STAMP).write_text(json.dumps({**stamp, "files": digests(copy, without=STAMP)}))
    if holds:
        found = check_export_folder(copy)
        assert found.bound.max_relative == 1e-4
        assert found.deviation is not None and 1e-5 < found.deviation.max_relative <= 1e-4
        assert "answered on cuda, reloaded on cpu, whose kernels sum in other orders" in found.bound.reason
    else:
        with pytest.raises(DifferenceError, match="the reloaded export is not the trained model: max_relative"):
            check_export_folder(copy)


@pytest.mark.parametrize("bound", [FLIPPING, FLOOR_16BIT, UNBOUNDED])
def test_limits_that_hold_between_devices_are_not_widened(bound: Bound) -> None:
    assert bound.between("cpu", "cuda") is bound and EXACT.between("cpu", "cpu") is EXACT


def test_what_was_written_without_verification_has_its_digests_alone(checkpoint: Any, tmp_path: Path) -> None:
    EXPORTERS["merged"](trained(checkpoint()), section("merged"), tmp_path / "out", INFO)
    assert not (tmp_path / "out" / FINGERPRINT).exists()
    assert check_export_folder(tmp_path / "out").deviation is None


def test_a_model_too_large_to_be_reloaded_here_is_checked_where_there_is_room(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    loaded = trained(checkpoint(), qat=INT4)
    report = EXPORTERS["compressed-tensors"](loaded, section("compressed-tensors", verify=True), tmp_path / "out", INFO)
    assert report.difference is None
    assert any("not reloaded: a fresh process needs" in note and "--check-only" in note for note in report.notes)
    found = check_export_folder(tmp_path / "out")
    assert found.deviation is not None and found.deviation.max_relative < 1e-5


def test_an_adapter_is_checked_on_its_base(checkpoint: Any, tmp_path: Path) -> None:
    EXPORTERS["peft"](trained(checkpoint()), section("peft", verify=True), tmp_path / "out", INFO_WITH_MODEL)
    found = check_export_folder(tmp_path / "out", base=checkpoint())
    assert found.deviation is not None and found.deviation.kl_mean < 1e-3


def test_a_folder_of_somebody_else_is_no_export(tmp_path: Path, checkpoint: Any) -> None:
    with pytest.raises(ExportError, match="is no export"):
        check_export_folder(checkpoint())
    (tmp_path / STAMP).write_text("{}")
    with pytest.raises(ExportError, match="lacks base_model, bound, files, format, recipe"):
        check_export_folder(tmp_path)


def test_the_command_line_wants_a_format_or_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", "somewhere"])
    assert end.value.code == 2
    assert "--check-only" in capsys.readouterr().err


def test_a_deviation_that_is_no_number_exceeds_every_bound() -> None:
    nan = Deviation(max_relative=float("nan"), kl_mean=0.0, top1_agreement=1.0, num_tokens=1)
    with pytest.raises(DifferenceError, match="install those"):
        Bound(max_relative=1.0, reason="any").check(nan, consequence="install those")


def test_digests_are_compared_name_by_name() -> None:
    assert changes({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"}) == [
        "c is missing",
        "b has changed",
        "d is new",
    ]
