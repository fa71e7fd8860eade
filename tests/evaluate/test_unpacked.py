from __future__ import annotations

import pytest
import torch
from torch import nn

import qaft.evaluate.unpacked as unpacked_module
from qaft.bases.affine import AffineBase
from qaft.bases.base import LinearSpec
from qaft.bases.dense import DenseBase
from qaft.evaluate.unpacked import unpacked
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.inputs import LayerInput, put_before
from qaft.quant.activation import TokenQuantizer
from qaft.quant.affine import Affine
from qaft.updates.dense import DenseDelta
from qaft.updates.lowrank import LowRank

GRID = Affine(bits=4, group_size=32, scale_dtype=torch.bfloat16)


def packed(bias: bool = True) -> AffineBase:
    return AffineBase.from_weight(torch.randn(64, 64), torch.randn(64) if bias else None, GRID, dtype=torch.bfloat16)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    spec = LinearSpec(name="x", out_features=64, in_features=64)
    trained = DenseDelta(spec)
    trained.delta.data.normal_(std=0.1)
    adapter = LowRank(spec, rank=2)
    adapter.up.data.normal_()
    return nn.Sequential(
        packed(),
        AdaptedLinear(DenseBase(torch.randn(64, 64).bfloat16()), trained, quantizer=GRID),
        AdaptedLinear(packed(bias=False), adapter),
        nn.LayerNorm(64, dtype=torch.bfloat16),
    )


@torch.no_grad()
def test_outputs_are_bit_identical_and_the_model_is_restored() -> None:
    net, x = model(), torch.randn(5, 64).bfloat16()
    before, modules = net(x), list(net.modules())
    with unpacked(net):
        assert not any(isinstance(m, AffineBase) for m in net.modules())
        assert torch.equal(net(x), before)
    assert list(net.modules()) == modules


@torch.no_grad()
def test_online_rotations_and_quantized_inputs_stay_in_front_of_the_dense_layers() -> None:
    net, x = model(), torch.randn(5, 64).bfloat16()
    plain = net(x)
    inputs = LayerInput(rotation=nn.Hardtanh(-0.5, 0.5), quantizer=TokenQuantizer(bits=4))
    for layer in (net[0], net[1]):
        put_before(layer, inputs)
    before = net(x)
    assert not torch.equal(before, plain)
    with unpacked(net):
        assert torch.equal(net(x), before)
    assert torch.equal(net(x), before)


def test_the_model_is_restored_after_an_error() -> None:
    net = model()
    modules = list(net.modules())
    with pytest.raises(RuntimeError, match="boom"), unpacked(net):
        raise RuntimeError("boom")
    assert list(net.modules()) == modules


def test_without_memory_the_model_stays_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked_module, "_free_bytes", lambda device: 1000)
    net = model()
    with unpacked(net):
        assert isinstance(net[0], AffineBase)
