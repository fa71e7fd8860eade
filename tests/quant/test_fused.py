"""The compiled pass has the codes of the reference, also where values lie on decision boundaries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import qaft.quant.fused as fused_module
from qaft.quant import Affine

GRIDS = {
    "symmetric": {"scale_dtype": torch.bfloat16, "group_size": 32},
    "asymmetric, clipped": {"symmetric": False, "clip": 0.95, "ste": "trust", "scale_dtype": torch.float16},
    "signed": {"range": "signed_absmax", "group_size": None},
}


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    yield
    fused_module._compiled.cache_clear()
    torch.compiler.reset()


def boundaries(scale: float) -> torch.Tensor:
    """Groups of 32 with all half steps of a 4-bit grid and their neighbours in fp32, under maxima of 7 and 8 steps."""
    halves = (torch.arange(31) - 15) / 2
    infinity = torch.tensor(float("inf"))
    near = [halves, torch.nextafter(halves, infinity), torch.nextafter(halves, -infinity)]
    rows = [torch.cat([torch.tensor([top]), part]) for part in near for top in (7.0, 8.0, -8.0, 7.5)]
    return torch.stack(rows).repeat(1, 4) * scale


# Inductor imports modules that torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
def test_values_and_gradients_equal_the_reference_bit_for_bit(options: dict) -> None:
    reference, fused = Affine(**options), Affine(**options, fused=True)
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(24, 256, generator=generator) * torch.logspace(-6, 3, 24).unsqueeze(1)
    zeros = torch.zeros(2, 128)
    samples = [boundaries(1.0), boundaries(0.3), boundaries(1e-3), gaussian, gaussian.bfloat16(), zeros]
    for weight in samples:
        found, expected = weight.clone().requires_grad_(), weight.clone().requires_grad_()
        values = fused(found)
        assert torch.equal(values, reference(expected))
        assert torch.equal(values, fused.quantize(weight).dequantize(torch.float32))
        values.sum().backward()
        reference(expected).sum().backward()
        assert found.grad is not None and torch.equal(found.grad, expected.grad)
    poisoned = gaussian.clone()
    poisoned[3, 5] = float("nan")
    assert torch.isnan(fused(poisoned)[3]).any() and torch.isfinite(fused(poisoned)[4]).all()


@pytest.mark.parametrize("kind", ["mse", "rms"])
def test_ranges_that_sum_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"fused=True: range {kind} sums over a group"):
        Affine(range=kind, fused=True)


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        Affine(fused=True)
