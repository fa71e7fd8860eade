from __future__ import annotations

import pytest
import torch
from torch import nn

from qaft.bases.base import LinearSpec
from qaft.bases.dense import DenseBase
from qaft.errors import TargetError
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.attach import (
    adapted_layers,
    attach,
    frozen_layers,
    load_trainables,
    trainable_parameters,
    update_buffers,
)
from qaft.quant.affine import Affine
from qaft.updates.dense import DenseDelta
from qaft.updates.roco import RoCo


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"a": DenseBase(torch.randn(4, 8), torch.randn(4)), "b": DenseBase(torch.randn(4, 8)), "norm": nn.LayerNorm(4)}
    )


def adapt(name: str, base) -> AdaptedLinear:
    return AdaptedLinear(base, DenseDelta(LinearSpec(name=name, out_features=4, in_features=8)))


def test_only_the_updates_of_the_named_layers_are_trainable() -> None:
    net = model()
    attach(net, ["a"], adapt)
    assert list(trainable_parameters(net)) == ["a.update.delta"]
    assert list(adapted_layers(net)) == ["a"]
    assert list(frozen_layers(net)) == ["b"]


def test_attaching_changes_no_output() -> None:
    net, x = model(), torch.randn(3, 8)
    before = net["a"](x)
    attach(net, ["a"], adapt)
    assert torch.equal(net["a"](x), before)


def test_a_module_that_is_no_linear_is_refused_by_name() -> None:
    with pytest.raises(TargetError, match="norm: LayerNorm"):
        attach(model(), ["norm"], adapt)


def test_trainables_round_trip_and_foreign_ones_are_refused() -> None:
    net, other = model(), model()
    attach(net, ["a"], adapt)
    attach(other, ["a"], adapt)
    net["a"].update.delta.data.normal_()
    load_trainables(other, {n: p.detach().clone() for n, p in trainable_parameters(net).items()})
    assert torch.equal(net["a"].update.delta, other["a"].update.delta)
    with pytest.raises(TargetError, match="names differ"):
        load_trainables(other, {"b.update.delta": torch.zeros(4, 8)})
    with pytest.raises(TargetError, match="saved shape"):
        load_trainables(other, {"a.update.delta": torch.zeros(4, 4)})


def test_the_rows_that_an_update_trains_are_saved_and_loaded_with_its_parameters() -> None:
    def rows_of(seed: int) -> nn.Module:
        net = model()
        spec = LinearSpec(name="a", out_features=4, in_features=8, seed=seed)
        attach(net, ["a"], lambda _, base: AdaptedLinear(base, RoCo(spec, rows=2, columns=1, choose="random")))
        return net

    net, other = rows_of(0), rows_of(1)
    assert list(update_buffers(net)) == ["a.update.rows", "a.update.columns"]
    assert not torch.equal(net["a"].update.rows, other["a"].update.rows)
    load_trainables(other, {**trainable_parameters(net), **update_buffers(net)})
    assert torch.equal(net["a"].update.rows, other["a"].update.rows)
    with pytest.raises(TargetError, match=r"1 names differ, first 'a\.update\.rows'"):
        load_trainables(other, {**trainable_parameters(net), "a.update.columns": net["a"].update.columns})


def test_qat_weight_is_the_dequantized_codes_in_the_model_dtype() -> None:
    base = DenseBase(torch.randn(4, 64).bfloat16())
    quantizer = Affine(bits=4, group_size=32, scale_dtype=torch.bfloat16)
    layer = AdaptedLinear(base, DenseDelta(LinearSpec(name="q", out_features=4, in_features=64)), quantizer=quantizer)
    layer.update.delta.data.normal_(std=0.1)
    codes = layer.quantized()
    assert codes is not None
    assert layer.weight().dtype == torch.bfloat16
    assert torch.equal(layer.weight(), codes.dequantize(torch.bfloat16))
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(layer(x), x @ codes.dequantize(torch.bfloat16).T)
