"""Self-distillation against its closed form, with teachers that are the model itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_regularized import Model, batch, logits, regularized
from torch import nn

from qaft.layers.attach import adapted_layers
from qaft.layers.inputs import LayerInput, put_before
from qaft.layers.passes import showing
from qaft.models.attention import AttentionInputs
from qaft.quant.activation import TokenQuantizer
from qaft.regularizers.kl import KLToBase, plain_activations
from qaft.train.loss import CausalLoss


def term(model: Model, **options) -> torch.Tensor:
    whole = regularized(model, [KLToBase(weight=1.0, **options)])
    return whole(**batch()) - CausalLoss(model)(**batch())


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", ["lowrank", "ssb"])
def test_the_term_is_zero_before_training(kind: str, quantized: bool) -> None:
    model = Model(kind, quantized=quantized, trained=False)
    assert abs(float(term(model).detach())) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_term_and_its_gradient_are_the_closed_form(temperature: float) -> None:
    model = Model(dtype=torch.float64)
    layers = adapted_layers(model)
    with torch.no_grad(), showing(layers, "base"):
        teacher = (logits(model) / temperature).softmax(-1)
    student = (logits(model) / temperature).log_softmax(-1)
    expected = temperature**2 * (teacher * (teacher.log() - student)).sum()
    parameters = [p for layer in layers.values() for p in layer.update.parameters()]
    found = term(model, temperature=temperature)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_the_base_is_the_model_without_its_update_bit_for_bit() -> None:
    trained, fresh = Model(), Model(trained=False)
    with showing(adapted_layers(trained), "base"):
        assert torch.equal(logits(trained), logits(fresh))
    assert not torch.equal(logits(trained), logits(fresh))


def test_the_fp_teacher_has_no_grid_and_the_base_teacher_has() -> None:
    quantized, plain = Model(quantized=True, trained=False), Model(trained=False)
    layers = adapted_layers(quantized)
    with showing(layers, "unquantized_base"):
        assert torch.equal(logits(quantized), logits(plain))
    with showing(layers, "base"):
        assert torch.equal(logits(quantized), logits(Model(quantized=True, trained=False)))
    # At the start already there is something to distil: what rounding has changed.
    expected = F.kl_div(
        logits(quantized).log_softmax(-1), logits(plain).log_softmax(-1), reduction="sum", log_target=True
    )
    torch.testing.assert_close(term(quantized, teacher="fp"), expected, atol=1e-4, rtol=1e-4)
    assert float(expected.detach()) > 1e-3


def test_the_fp_teacher_takes_the_grids_off_activations_and_cache_and_puts_them_back() -> None:
    layer, grid = nn.Linear(8, 8), TokenQuantizer(bits=4)
    put_before(layer, LayerInput(quantizer=grid))
    model = nn.ModuleDict({"layer": layer, "attention": AttentionInputs(key=grid, value=grid)})
    x, qkv = torch.randn(3, 8), torch.randn(1, 2, 3, 8)
    quantized = layer(x)
    with pytest.raises(RuntimeError, match="stop"), plain_activations(model):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert all(torch.equal(y, qkv) for y in model["attention"](qkv, qkv, qkv))
        raise RuntimeError("stop")
    assert torch.equal(layer(x), quantized)
    assert not torch.equal(model["attention"](qkv, qkv, qkv)[1], qkv)


def test_the_teacher_sees_the_same_dropout_masks() -> None:
    model = Model(dropout=0.5, trained=False).train()
    torch.manual_seed(1)
    whole = regularized(model, [KLToBase(weight=1.0)])(**batch())
    torch.manual_seed(1)
    assert abs(float((whole - CausalLoss(model)(**batch())).detach())) < 1e-5


def test_evaluation_and_sums_by_group_are_the_plain_loss() -> None:
    model = Model()
    whole = regularized(model, [KLToBase(weight=10.0)])
    plain = CausalLoss(model)(**batch())
    with torch.no_grad():
        assert torch.equal(whole(**batch()), plain)
    whole.eval()
    assert torch.equal(whole(**batch()), plain)


@pytest.mark.parametrize("options", [{"weight": 0}, {"temperature": -1.0}, {"teacher": "gold"}])
def test_impossible_options_are_refused(options) -> None:
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=rf"^{name}=.* must be"):
        KLToBase(**options)
