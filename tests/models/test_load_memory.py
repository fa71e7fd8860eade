"""The peak of host memory while a model is loaded, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from large_checkpoint import HIDDEN, INTERMEDIATE, write_large_checkpoint

MEASURE = """
import json, re, sys
import torch
from qaft.bases.bnb import FourBitBase
from qaft.models.load import load_model
from qaft.sections import ModelSection

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
FourBitBase.from_weight(torch.randn(64, 64), None, dtype=torch.bfloat16)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here
before = status("VmRSS")
model = load_model(ModelSection(name=sys.argv[1], storage=sys.argv[2]), qat=None).model
size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
print(json.dumps({"size": size, "peak": status("VmHWM") - before, "after": status("VmRSS") - before}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_large_checkpoint(tmp_path_factory.mktemp("large"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the memory counters of Linux")
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_peak_is_the_packed_model_a_shard_and_a_layer(checkpoint: Path, storage: str) -> None:
    command = [sys.executable, "-c", MEASURE, str(checkpoint), storage]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "PermissionError" in result.stderr:
        pytest.skip("this system does not let a process reset its memory counters")
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    dense = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    shard = max(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    largest_tensor = 4 * HIDDEN * INTERMEDIATE
    bound = measured["size"] + shard + 2 * largest_tensor
    assert bound < 0.85 * dense  # otherwise the bound would prove nothing
    assert measured["peak"] <= bound
    assert measured["after"] <= measured["size"] + shard
