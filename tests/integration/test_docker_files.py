"""What can be known of the image without an engine: its build finds its files, pins its versions and runs as nobody."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) with continued lines joined; comments and empty lines are left out."""
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def of(name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions() if instruction == name]


def copied() -> list[str]:
    return [source for arguments in of("COPY") for source in arguments.split()[:-1]]


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["services"]["train"]


def test_everything_that_is_copied_exists_and_is_sent_to_the_build() -> None:
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    sent = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    assert "*" in ignore
    assert sorted(set(copied())) == sorted(sent)
    assert all((ROOT / source).exists() for source in copied())


def test_every_installation_is_pinned_by_the_constraints() -> None:
    commands = [part for arguments in of("RUN") for part in arguments.split("&&") if "pip install" in part]
    assert len(commands) == 3
    assert all("-c constraints.txt" in command and "--no-cache-dir" in command for command in commands)
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {"torch", "deepspeed", "transformers", "bitsandbytes", "accelerate"} <= pinned
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (wanted,) = re.findall(r"'\.\[(.*)\]'", commands[-1])
    assert set(wanted.split(",")) <= extras.keys()


def test_the_last_user_is_a_number_and_not_root() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", of("USER")[-1])
    names = [name for name, _ in instructions()]
    assert "RUN" not in names[names.index("USER") :]


def test_the_base_image_has_a_fixed_python_and_distribution() -> None:
    assert all(fnmatch(image, "python:3.*-slim-*") for image in of("FROM"))


def test_compose_reserves_gpus_shares_memory_and_drops_root(service: dict[str, Any]) -> None:
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert service["shm_size"] == "8gb"
    assert service["user"] == "${QAFT_UID:-1000}:${QAFT_GID:-1000}"
    assert service["init"] is True


def test_compose_builds_this_image_and_starts_what_is_in_it(service: dict[str, Any]) -> None:
    build = service["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"
    (start,) = service["entrypoint"]
    assert (ROOT / start).stat().st_mode & 0o111
    assert start.split("/")[0] in copied()


def test_every_mounted_folder_is_that_of_the_image(service: dict[str, Any]) -> None:
    targets = [re.sub(r":ro$", "", volume).rpartition(":")[2] for volume in service["volumes"]]
    assert targets == ["/home/qaft/.cache", "/home/qaft/data", "/home/qaft/runs"]
    environment = dict(pair.split("=", 1) for arguments in of("ENV") for pair in arguments.split())
    caches = [value for name, value in environment.items() if name == "HF_HOME" or name.endswith("CACHE_DIR")]
    assert len(caches) == 3
    assert all(value.startswith("/home/qaft/.cache/") for value in caches)
    assert {"USER", "LOGNAME", "HOME"} <= environment.keys()
