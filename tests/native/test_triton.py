from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("triton_cases.py")


def test_triton_kernels_have_the_bits_of_torch_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_nothing_imports_triton_on_a_cpu() -> None:
    code = (
        "import sys, torch; from qaft.quant import Affine, TokenQuantizer; from qaft.rotation.hadamard import Hadamard\n"
        "x = torch.ones(2, 128); Affine()(x); TokenQuantizer()(x); Hadamard(128)(x); sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
