"""A folder is checked against what is on it: the run of a patch, and the base when the patch has been taken off."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import killed_in_rename
from tiny_export import INFO, section, trained

from qaft.arch import arch_of
from qaft.cli import main
from qaft.errors import DifferenceError, ExportError
from qaft.export import EXPORTERS, ExportReport
from qaft.export.base import UNBOUNDED
from qaft.export.check import check_export_folder
from qaft.export.fingerprint import FINGERPRINT, Fingerprint
from qaft.export.patch_file import Patch, load_patch
from qaft.export.patch_folder import apply_patch, revert_patch
from qaft.export.patch_state import STATE, PatchState, read_state
from qaft.export.record import read_record
from qaft.layers.attach import adapted_layers
from qaft.models.online import put_online
from qaft.quant import TokenQuantizer
from qaft.quant.compressed_tokens import CompressedTensorsTokens
from qaft.sections import GridSection, QatSection

INT4 = QatSection(weights=GridSection(bits=4, group_size=32))
CHANGE = {"apply": apply_patch, "revert": revert_patch}


@dataclass(frozen=True)
class Written:
    """A packed base, and patches of q and of v that lie on it; ``report`` is that of the patch of q."""

    base: Path
    q: Patch
    v: Patch
    report: ExportReport


def write(folder: Path, checkpoint: Path, *, verify: bool, inputs: TokenQuantizer | None = None) -> Written:
    reports = {}
    for name in ("q_proj", "v_proj"):
        loaded = trained(
            checkpoint, "rows", qat=INT4, storage="int4", select=lambda n: n.endswith(("q_proj", "v_proj")), size=0.3
        )
        if inputs is not None:
            put_online(loaded.model, arch_of(loaded.source.config), None, inputs=inputs, cache=None)
        with torch.no_grad():
            for layer_name, layer in adapted_layers(loaded.model).items():
                if not layer_name.endswith(name):
                    layer.update.row_delta.zero_()
                    layer.update.rows = layer.update.rows[:0]
                    layer.update.row_delta.data = layer.update.row_delta.data[:0]
        reports[name] = EXPORTERS["patch"](loaded, section("patch", verify=verify), folder / name, INFO)
    with torch.no_grad():
        for layer in adapted_layers(loaded.model).values():
            layer.update.row_delta.zero_()
    EXPORTERS["compressed-tensors"](loaded, section("compressed-tensors", verify=verify), folder / "base", INFO)
    q, v = load_patch(folder / "q_proj"), load_patch(folder / "v_proj")
    return Written(folder / "base", q, v, reports["q_proj"])


@pytest.fixture(scope="module")
def verified(checkpoint: Callable[..., Path], tmp_path_factory: Any) -> Written:
    return write(tmp_path_factory.mktemp("verified"), checkpoint(), verify=True)


@pytest.fixture(scope="module")
def unverified(checkpoint: Callable[..., Path], tmp_path_factory: Any) -> Written:
    """Its checks start no process."""
    return write(tmp_path_factory.mktemp("unverified"), checkpoint(), verify=False)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_a_patched_base_answers_as_the_run_of_the_patch_and_without_it_as_the_base(
    verified: Written, tmp_path: Path
) -> None:
    base = copied(verified.base, tmp_path / "base")
    own = (base / FINGERPRINT).read_bytes()
    apply_patch(verified.q, base, None)
    found = check_export_folder(base)
    assert found.patches == ("q_proj",) and found.format == "compressed-tensors"
    assert found.deviation is not None and found.deviation.max_relative <= 1e-5 == found.bound.max_relative
    assert (base / FINGERPRINT).read_bytes() == own
    revert_patch(verified.q, base, None)
    found = check_export_folder(base)
    assert found.patches == () and found.deviation is not None and found.deviation.max_relative <= 1e-5


def test_the_answers_of_patch_and_base_are_farther_apart_than_the_bound(verified: Written) -> None:
    """Otherwise the test above could not tell one from the other."""
    assert verified.q.answers is not None
    ours, theirs = Fingerprint.from_values(verified.q.answers, Path()), Fingerprint.load(verified.base / FINGERPRINT)
    gaps = [(a - b).abs().max() / a.abs().max() for a, b in zip(ours.logits, theirs.logits, strict=True)]
    assert max(gaps) > 1e-3


def test_a_fingerprint_of_another_function_is_found_under_correct_digests(verified: Written, tmp_path: Path) -> None:
    base = apply_patch(verified.q, verified.base, tmp_path / "base")
    state = read_state(base)
    PatchState((replace(state.patches[0], answers=verified.v.answers),), state.files).save(base)
    with pytest.raises(DifferenceError, match="the reloaded export is not the trained model: max_relative"):
        check_export_folder(base)


def test_a_patch_says_that_it_is_checked_on_its_base(verified: Written, tmp_path: Path) -> None:
    assert verified.report.difference is None
    assert any("no program loads rows without their base" in note for note in verified.report.notes)
    found = check_export_folder(verified.report.folder)
    assert found.deviation is None and "a patch is loaded on its base" in found.uncompared


def test_of_two_patches_the_files_are_checked_and_of_the_one_that_stays_the_answers_too(
    verified: Written, tmp_path: Path
) -> None:
    base = copied(verified.base, tmp_path / "base")
    apply_patch(verified.q, base, None)
    apply_patch(verified.v, base, None)
    found = check_export_folder(base)
    assert found.patches == ("q_proj", "v_proj") and found.deviation is None and found.bound == UNBOUNDED
    assert "several patches are on it" in found.uncompared
    assert read_record(base) is None
    revert_patch(verified.q, base, None)
    found = check_export_folder(base)
    assert found.patches == ("v_proj",) and found.deviation is not None and found.deviation.max_relative <= 1e-5
    record = read_record(base)
    assert record is not None and record.format == "patch"


def test_the_command_line_names_the_patches(
    unverified: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = apply_patch(unverified.q, unverified.base, tmp_path / "base")
    with pytest.raises(SystemExit) as end:
        main(["export", "--check-only", str(base)])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "files as they were exported and patched (q_proj)" in printed
    assert "logits: not compared, the patch q_proj was written with verify: false" in printed


@pytest.mark.parametrize("harm", ["a row", "another file", "the state"])
def test_a_patched_folder_that_was_changed_since_is_found(unverified: Written, tmp_path: Path, harm: str) -> None:
    base = apply_patch(unverified.q, unverified.base, tmp_path / "base")
    found = check_export_folder(base)
    assert found.deviation is None and found.uncompared == "the patch q_proj was written with verify: false"
    if harm == "the state":
        (base / STATE).unlink()
    else:
        path = base / ("model.safetensors" if harm == "a row" else "config.json")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(DifferenceError, match=r"(config\.json|model\.safetensors) has changed"):
        check_export_folder(base)


@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize("verb", CHANGE)
def test_a_kill_between_two_renames_leaves_a_folder_that_is_checked_as_what_it_is(
    unverified: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, call: int
) -> None:
    base = copied(unverified.base, tmp_path / "base")
    if verb == "revert":
        apply_patch(unverified.q, base, None)
    before = check_export_folder(base).patches
    killed_in_rename(monkeypatch, call, lambda: CHANGE[verb](unverified.q, base, None))
    assert base.exists() is (call != 1)
    if call == 1:
        with pytest.warns(UserWarning, match="brought back"):
            found = check_export_folder(base)
    else:
        found = check_export_folder(base)
    after = ("q_proj",) if verb == "apply" else ()
    assert found.patches == (after if call == 2 else before)


@pytest.mark.parametrize("inputs", [None, CompressedTensorsTokens(bits=8), TokenQuantizer(bits=4)])
def test_a_base_with_the_same_weights_and_other_inputs_is_refused(
    checkpoint: Any, unverified: Written, tmp_path: Path, inputs: TokenQuantizer | None
) -> None:
    other = write(tmp_path / "W4A8", checkpoint(), verify=False, inputs=TokenQuantizer(bits=8))
    base = (
        unverified.base if inputs is None else write(tmp_path / "other", checkpoint(), verify=False, inputs=inputs).base
    )
    assert other.q.base == unverified.q.base
    with pytest.raises(ExportError, match=r"its layers read inputs of .* those of the run inputs of 8 bits as vllm"):
        apply_patch(other.q, base, tmp_path / "out")
    apply_patch(other.q, other.base, tmp_path / "out")
