"""The peak of host memory while a packed model is exported: a shard and a layer above it, whatever the model's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import resident
from large_checkpoint import HIDDEN, INTERMEDIATE, write_large_checkpoint

SHARD = 8 * 2**20

EXPORT = """
import json, sys
from pathlib import Path
import torch
from resident import Mark
from tiny_export import INFO, section, trained
from qaft.export import EXPORTERS
from qaft.sections import GridSection, QatSection

torch.set_num_threads(1)
_, checkpoint, out, format, storage, grid, shard = sys.argv
qat = QatSection(weights=GridSection.model_validate(json.loads(grid)))
loaded = trained(Path(checkpoint), "rows", qat=qat, storage=storage, select=lambda name: name.endswith("v_proj"))
how = section(format, max_shard_gb=int(shard) / 2**30)
mark = Mark()
EXPORTERS[format](loaded, how, Path(out), INFO)
print(json.dumps({"peak": mark.peak()}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_large_checkpoint(tmp_path_factory.mktemp("large"))


@pytest.mark.skipif(not resident.SUPPORTED, reason="needs the memory counters of Linux")
@pytest.mark.parametrize(
    ("format", "storage", "grid"),
    [
        ("merged", "int4", {"bits": 4, "group_size": 128}),
        ("compressed-tensors", "int4", {"bits": 4, "group_size": 128}),
        ("bnb", "nf4", {"kind": "nf4"}),
        ("gguf", "int4", {"kind": "q4_0"}),
        ("gptq", "int4", {"bits": 4, "group_size": 128}),
    ],
    ids=["merged", "compressed-tensors", "bnb", "gguf", "gptq"],
)
def test_peak_is_a_shard_and_a_layer_above_the_packed_model(
    checkpoint: Path, tmp_path: Path, format: str, storage: str, grid: dict[str, object]
) -> None:
    arguments = [str(checkpoint), str(tmp_path / "out"), format, storage, json.dumps(grid), str(SHARD)]
    environment = {**os.environ, **resident.ALLOCATOR, **resident.search_path(Path(__file__).parent)}
    result = subprocess.run(
        [sys.executable, "-c", EXPORT, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if "PermissionError" in result.stderr:
        pytest.skip("this system does not let a process reset its memory counters")
    assert result.returncode == 0, result.stderr
    files = [file for file in (tmp_path / "out").iterdir() if file.suffix in (".safetensors", ".gguf")]
    written = sum(file.stat().st_size for file in files)
    # Its codes as int32, one more pass over them, and what is packed of them.
    one_layer = int(2.25 * 4 * HIDDEN * INTERMEDIATE)
    bound = SHARD + one_layer
    assert len(files) > 2 or format == "gguf"  # one file by nature, written tensor by tensor
    assert bound < 0.7 * written  # otherwise the bound would prove nothing
    assert json.loads(result.stdout)["peak"] <= bound
