"""What is special to scalings: closed forms, another library, and what is kept for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qaft.bases.base import LinearSpec
from qaft.bases.dense import DenseBase
from qaft.quant.affine import Affine
from qaft.quant.nf4 import NF4
from qaft.updates import UPDATES

SPEC = LinearSpec(name="layer", out_features=6, in_features=8, dtype=torch.float64)


def trained(kind: str, spec: LinearSpec = SPEC) -> nn.Module:
    update = UPDATES[kind](spec)
    generator = torch.Generator().manual_seed(1)
    for parameter in update.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return update


def test_ssb_gradients_are_the_closed_form() -> None:
    update, w = trained("ssb"), torch.randn(6, 8, dtype=torch.float64)
    x, g = torch.randn(11, 8, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    (update(x, lambda v: v @ w.T) * g).sum().backward()
    s_in, s_out = 1 + update.inputs.detach(), 1 + update.outputs.detach()
    torch.testing.assert_close(update.inputs.grad, (x * ((s_out * g) @ w)).sum(0))
    torch.testing.assert_close(update.outputs.grad, (g * ((s_in * x) @ w.T)).sum(0))


def test_ssb_scales_the_rows_of_both_singular_bases() -> None:
    update, w = trained("ssb"), torch.randn(6, 8, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    expected = (torch.diag(1 + update.outputs) @ u) @ torch.diag(s) @ (vt @ torch.diag(1 + update.inputs))
    torch.testing.assert_close(update.merge(w), expected)


@pytest.mark.parametrize(("kind", "feedforward"), [("ia3", []), ("ssl", ["layer"])])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ia3_and_ssl_are_those_of_peft(kind: str, feedforward: list[str]) -> None:
    from peft import IA3Config, get_peft_model

    model = nn.Sequential()
    model.add_module("layer", nn.Linear(8, 6, bias=False))
    w = model.layer.weight.detach().clone()
    reference = get_peft_model(model, IA3Config(target_modules=["layer"], feedforward_modules=feedforward))
    update = trained(kind, LinearSpec(name="layer", out_features=6, in_features=8))
    (change,) = update.parameters()
    (vector,) = (p for p in reference.parameters() if p.requires_grad)
    vector.data = (1 + change.data).view_as(vector)
    x = torch.randn(5, 8)
    torch.testing.assert_close(update(x, lambda v: F.linear(v, w)), reference(x))


def test_a_scaling_that_16_bits_cannot_hold_is_right_on_average() -> None:
    change = 0.0215
    update = UPDATES["ia3"](LinearSpec(name="layer", out_features=4096, in_features=1))
    update.outputs.data.fill_(change)
    y = torch.rand(1, 4096, generator=torch.Generator().manual_seed(0)).add(1).bfloat16()
    scaled = update(torch.ones(1, 1).bfloat16(), lambda _: y).detach()
    assert abs(float(scaled.double().sum() / y.double().sum()) - 1 - change) < 2e-4
    assert abs(float(torch.tensor(1 + change).bfloat16()) - 1 - change) > 1e-3


@pytest.mark.parametrize("quantizer", [NF4(group_size=64), Affine(bits=8, group_size=None)], ids=["nf4", "int8"])
def test_output_scales_fold_into_the_scales_of_a_packed_weight_with_the_same_codes(quantizer) -> None:
    spec = LinearSpec(name="layer", out_features=6, in_features=64)
    update = UPDATES["ia3"](spec)
    # Powers of two commute with every rounding, so the fold is exact to the bit.
    update.outputs.data = 2.0 ** torch.arange(-3, 3) - 1
    packed = quantizer.quantize(torch.randn(6, 64, generator=torch.Generator().manual_seed(2)))
    merged = quantizer.quantize(update.merge(packed.dequantize(torch.float32)))
    assert torch.equal(merged.values, packed.values)
    assert torch.equal(merged.scale, packed.scale * (1 + update.outputs.detach())[:, None])


KEPT = {"ssl": 8, "ia3": 6, "ssb": 8 + 6}


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_kept_for_backward_is_the_input_or_the_output_that_is_scaled(kind: str) -> None:
    update, base = trained(kind, LinearSpec(name="layer", out_features=6, in_features=8)), DenseBase(torch.randn(6, 8))
    tokens, kept = 100, {}
    known = {p.untyped_storage().data_ptr() for p in update.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage().data_ptr()
        if key not in known:
            kept[key] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(tokens, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = update(x, base.matmul)
    assert sum(kept.values()) == 4 * tokens * KEPT[kind]
    y.sum().backward()
