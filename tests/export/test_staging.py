"""A folder appears complete or not at all: existing ones, failures, full disks, kills."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_export import INFO, section, trained

from qaft.errors import ExportError
from qaft.export import EXPORTERS, checkpoint_writer, publish, staging
from qaft.export.staging import staged


def test_the_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    with staged(tmp_path / "deep" / "out", force=False) as stage:
        (stage / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"


def test_an_existing_folder_is_kept_without_force_and_replaced_with_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(ExportError, match=r"out: exists already.*force"), staged(tmp_path / "out", force=False):
        pass
    assert (tmp_path / "out" / "old").exists()
    with staged(tmp_path / "out", force=True) as stage:
        (stage / "new").write_text("2")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out", force=False) as stage:
        (stage / "new").write_text("2")
    assert (tmp_path / "out" / "new").exists()


def test_a_file_in_the_way_is_refused_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ExportError, match="is a file"), staged(tmp_path / "out", force=True):
        pass
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, force: bool) -> None:
    if force:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(OSError, match="disk"), staged(tmp_path / "out", force=force) as stage:
        (stage / "half").write_text("2")
        raise OSError(28, "disk full")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == (["out", "out/old"] if force else [])


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(5, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="input/output"), staged(tmp_path / "out", force=True) as stage:
        (stage / "new").write_text("2")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["out", "out/old"]


@pytest.mark.parametrize("place", ["shard", "card"])
@pytest.mark.parametrize("format", ["merged", "compressed-tensors"])
def test_an_export_onto_a_full_disk_leaves_nothing(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, place: str
) -> None:
    from qaft.sections import GridSection, QatSection

    loaded = trained(checkpoint(), qat=QatSection(weights=GridSection(group_size=32)))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        *((checkpoint_writer, "save_tensors", full) if place == "shard" else (publish, "write_json", full))
    )
    with pytest.raises(OSError, match="No space left"):
        EXPORTERS[format](loaded, section(format), tmp_path / "out", INFO)
    assert list(tmp_path.iterdir()) == []


EXPORT = """
import runpy, shutil, sys, time
from pathlib import Path

def wait(*_, **__):
    print("ready", flush=True)
    time.sleep(60)

# By its path: the package around it would import torch.
staged = runpy.run_path(sys.argv[2])["staged"]
with staged(Path(sys.argv[1]), force=True) as stage:
    (stage / "model.safetensors").write_text("x")
    if sys.argv[3] == "writing":
        wait()
    shutil.rmtree = wait
"""


@contextmanager
def unfinished_export(folder: Path, until: str) -> Iterator[subprocess.Popen[str]]:
    """An export by another process that stands still while it is writing, or removing what it has replaced."""
    command = [sys.executable, "-c", EXPORT, str(folder), staging.__file__, until]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_killed_export_leaves_nothing_that_looks_finished_and_the_next_one_removes_it(tmp_path: Path) -> None:
    with unfinished_export(tmp_path / "out", "writing") as process:
        kill(process)
    left = f"out.tmp-{platform.node()}-{process.pid}"
    assert names(tmp_path) == [left]
    assert os.listdir(tmp_path / left) == ["model.safetensors"]
    with (
        pytest.warns(UserWarning, match=rf"{left}: removed, a killed export had left it"),
        staged(tmp_path / "out", force=False) as stage,
    ):
        (stage / "new").write_text("2")
    assert names(tmp_path) == ["out"]


def test_a_replaced_folder_that_a_killed_export_had_not_removed_yet_goes_with_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with unfinished_export(tmp_path / "out", "removing") as process:
        kill(process)
    left = f"out.old-{platform.node()}-{process.pid}"
    assert names(tmp_path) == ["out", left]
    with pytest.warns(UserWarning, match=f"{left}: removed"), staged(tmp_path / "out", force=True):
        pass
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("until", ["writing", "removing"])
def test_what_belongs_to_a_living_process_or_to_another_host_or_folder_stays(tmp_path: Path, until: str) -> None:
    (tmp_path / "out").mkdir()
    others = [f"out.tmp-{platform.node()}x-1", "out.tmp-1", f"out2.tmp-{platform.node()}-1"]
    for name in others:
        (tmp_path / name).mkdir()
    with unfinished_export(tmp_path / "out", until) as process:
        with staged(tmp_path / "out", force=True):
            pass
        kind = {"writing": "tmp", "removing": "old"}[until]
        assert names(tmp_path) == sorted([*others, "out", f"out.{kind}-{platform.node()}-{process.pid}"])


def test_the_old_folder_stays_when_an_export_was_killed_between_the_two_renames(tmp_path: Path) -> None:
    # Nothing is at the place itself: what was to be replaced is all there is.
    (tmp_path / f"out.old-{platform.node()}-1").mkdir()
    with staged(tmp_path / "out", force=False):
        assert names(tmp_path)[0] == f"out.old-{platform.node()}-1"
