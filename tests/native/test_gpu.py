from __future__ import annotations

import pytest
import torch

from qaft.native import gpu


@pytest.fixture(autouse=True)
def _forget():
    gpu._compiles.cache_clear()
    yield
    gpu._compiles.cache_clear()


def test_tensors_on_a_cpu_are_not_for_triton() -> None:
    assert not gpu.on_triton(torch.ones(2))


def test_a_device_for_which_triton_cannot_compile_is_left_to_torch_with_a_warning() -> None:
    # Outside its interpreter Triton runs nothing on a CPU.
    pytest.importorskip("triton")
    with pytest.warns(UserWarning, match="Triton cannot run kernels on cpu, torch will do their work"):
        assert not gpu._compiles(torch.device("cpu"))


def test_without_triton_there_is_nothing_to_warn_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert not gpu._compiles(torch.device("cpu"))
