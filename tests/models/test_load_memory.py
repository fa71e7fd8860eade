"""The peak of host memory while a model is loaded, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import resident
from large_checkpoint import write_large_checkpoint

MEASURE = """
import json, sys
import torch
from qaft.bases.bnb import FourBitBase
from qaft.models.load import load_model
from qaft.sections import ModelSection
from resident import Mark

torch.set_num_threads(1)
FourBitBase.from_weight(torch.randn(64, 64), None, dtype=torch.bfloat16)
mark = Mark()
model = load_model(ModelSection(name=sys.argv[1], storage=sys.argv[2]), qat=None).model
size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
print(json.dumps({"size": size, "peak": mark.peak(), "after": mark.now()}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_large_checkpoint(tmp_path_factory.mktemp("large"))


@pytest.mark.skipif(not resident.SUPPORTED, reason="needs the memory counters of Linux")
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_peak_is_the_packed_model_and_a_shard(checkpoint: Path, storage: str) -> None:
    command = [sys.executable, "-c", MEASURE, str(checkpoint), storage]
    environment = {**os.environ, **resident.ALLOCATOR, **resident.search_path()}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "PermissionError" in result.stderr:
        pytest.skip("this system does not let a process reset its memory counters")
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    dense = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    shard = max(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    bound = measured["size"] + shard
    assert bound < 0.85 * dense  # otherwise the bound would prove nothing
    assert measured["peak"] <= bound
    assert measured["after"] <= measured["size"] + shard / 2
