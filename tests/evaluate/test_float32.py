"""fp32 logits of 16-bit models: those of an upcast copy, and the model is untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_lm import tiny_llama
from torch import nn

from qaft.bases.base import LinearSpec
from qaft.bases.dense import DenseBase
from qaft.evaluate.float32 import float32_weights, float_logits, native_logits
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.attach import attach, replace_module
from qaft.quant.affine import Affine
from qaft.updates import LowRank

IDS = [torch.tensor([5, 9, 33, 2]), torch.tensor([1, 2])]


def test_native_logits_are_those_of_the_model_in_its_own_dtype() -> None:
    model = tiny_llama(torch.bfloat16, tied=False).train()
    with torch.no_grad():
        expected = [model.eval()(ids[None]).logits[0] for ids in IDS]
    found = native_logits(model.train(), IDS)
    assert model.training and found[0].dtype == torch.float32
    assert all(torch.equal(a, b.float()) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], float_logits(model, IDS)[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_those_of_an_upcast_copy(dtype: torch.dtype, tied: bool) -> None:
    model = tiny_llama(dtype, tied=tied)
    reference = copy.deepcopy(model).float()
    with torch.no_grad():
        for ids, logits in zip(IDS, float_logits(model, IDS), strict=True):
            assert torch.equal(logits, reference(ids[None]).logits[0])


def test_the_model_is_bit_identical_afterwards() -> None:
    model = tiny_llama(torch.bfloat16).train()
    before = {n: (p.data_ptr(), p.dtype) for n, p in model.named_parameters()}
    float_logits(model, IDS)
    assert {n: (p.data_ptr(), p.dtype) for n, p in model.named_parameters()} == before
    assert model.training and not model.model.norm._forward_pre_hooks


def test_the_model_is_restored_after_a_failure_inside_a_module() -> None:
    model = tiny_llama(torch.bfloat16)
    with pytest.raises(IndexError), float32_weights(model):
        model(torch.tensor([[10**6]]))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_parameters_are_rounded_through_another_dtype() -> None:
    model = tiny_llama(torch.float32)
    expected = copy.deepcopy(model)
    for parameter in expected.parameters():
        parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        assert torch.equal(float_logits(model, IDS, via=torch.bfloat16)[0], expected(IDS[0][None]).logits[0])


@pytest.mark.parametrize("quantizer", [None, Affine(bits=4, group_size=16, scale_dtype=torch.bfloat16)])
def test_adapted_layers_keep_the_rounding_of_their_weights(quantizer: Affine | None) -> None:
    model = tiny_llama(torch.bfloat16)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for name in names:
        replace_module(model, name, DenseBase(model.get_submodule(name).weight))  # type: ignore[arg-type]

    def adapt(name: str, base: DenseBase) -> AdaptedLinear:
        update = LowRank(LinearSpec(name=name, out_features=base.out_features, in_features=base.in_features), rank=2)
        nn.init.normal_(update.up, std=0.1)
        return AdaptedLinear(base, update, quantizer=quantizer)

    layers = attach(model, names, adapt)  # type: ignore[arg-type]
    logits = float_logits(model, IDS)
    reference = tiny_llama(torch.bfloat16).float()
    for name, layer in layers.items():
        weight = layer.latent() if quantizer is None else layer.weight()
        reference.get_submodule(name).weight = nn.Parameter(weight.detach().float())
    with torch.no_grad():
        expected = reference(IDS[0][None]).logits[0]
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
