"""Laws that hold for every registered update, over dense and packed bases, in activation space and in weight space."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qaft.bases.base import FrozenLinear, LinearSpec
from qaft.bases.dense import DenseBase
from qaft.layers.adapted import AdaptedLinear
from qaft.quant.affine import Affine
from qaft.updates import UPDATES

OUT, IN = 24, 64

CASES = {
    "dense": ("dense", {}),
    "lowrank": ("lowrank", {"rank": 3, "alpha": 5.0}),
    "roco-rows": ("roco", {"rows": 3}),
    "roco-columns": ("roco", {"columns": 4, "choose": "random"}),
    "roco-both": ("roco", {"rows": 2, "columns": 3, "choose": "first"}),
}


def test_every_registered_update_has_a_contract_case() -> None:
    assert {kind for kind, _ in CASES.values()} == set(UPDATES)


def make(case: str, dtype: torch.dtype = torch.float64):
    kind, options = CASES[case]
    spec = LinearSpec(
        name="model.layers.0.self_attn.q_proj",
        out_features=OUT,
        in_features=IN,
        dtype=dtype,
        num_heads=4,
        input_scale=0.5,
    )
    return UPDATES[kind](spec, **options)


def trained(case: str, dtype: torch.dtype = torch.float64):
    update = make(case, dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in update.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return update


def weight(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2), dtype=dtype)


@pytest.fixture(params=["dense", "int4"])
def base(request: pytest.FixtureRequest) -> FrozenLinear:
    if request.param == "dense":
        return DenseBase(weight())
    from qaft.bases.affine import AffineBase

    return AffineBase.from_weight(weight().float(), None, Affine(bits=4, group_size=32), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_the_merged_weight(case: str, base: FrozenLinear) -> None:
    update, x = trained(case), torch.randn(5, 7, IN, dtype=torch.float64)
    torch.testing.assert_close(
        update(x, base.matmul), F.linear(x, update.merge(base.dequantize())), atol=1e-12, rtol=1e-12
    )


@pytest.mark.parametrize("case", CASES)
def test_merge_changes_nothing_at_construction(case: str, base: FrozenLinear) -> None:
    w = base.dequantize()
    assert torch.equal(make(case).merge(w), w)


@pytest.mark.parametrize("case", CASES)
def test_training_changes_the_merged_weight(case: str) -> None:
    assert not torch.equal(trained(case).merge(weight()), weight())


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree_between_activation_space_and_weight_space(case: str, base: FrozenLinear) -> None:
    # A random linear functional: with ||y||^2 an orthogonal update would have gradient 0 and every mistake would pass.
    update, x = trained(case), torch.randn(9, IN, dtype=torch.float64, requires_grad=True)
    functional = torch.randn(9, OUT, dtype=torch.float64)
    inputs = [x, *update.parameters()]
    activation = torch.autograd.grad((update(x, base.matmul) * functional).sum(), inputs)
    dense = torch.autograd.grad((F.linear(x, update.merge(base.dequantize())) * functional).sum(), inputs)
    for a, b in zip(activation, dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_rebuilt_weight_gives_autograds_gradients(case: str) -> None:
    quantizer = Affine(bits=4, group_size=32)
    layer = AdaptedLinear(DenseBase(weight(torch.float32)), trained(case, torch.float32), quantizer=quantizer)
    x = torch.randn(9, IN, requires_grad=True)
    functional = torch.randn(9, OUT)
    inputs = [x, *layer.update.parameters()]
    lean = torch.autograd.grad((layer(x) * functional).sum(), inputs)
    plain = torch.autograd.grad((F.linear(x, layer.weight()) * functional).sum(), inputs)
    for a, b in zip(lean, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_parameters_keep_the_requested_dtype_and_the_output_keeps_the_input_dtype(
    case: str, base: FrozenLinear
) -> None:
    update = make(case, torch.float32)
    assert {p.dtype for p in update.parameters()} == {torch.float32}
    assert update(torch.randn(2, IN, dtype=torch.bfloat16), base.matmul).dtype == torch.bfloat16
    assert update.merge(base.dequantize()).dtype == base.dequantize().dtype


@pytest.mark.parametrize("case", CASES)
def test_state_dict_round_trip_reproduces_the_update(case: str) -> None:
    update, other = trained(case), make(case)
    other.load_state_dict(update.state_dict())
    assert torch.equal(update.merge(weight()), other.merge(weight()))


@pytest.mark.parametrize("case", CASES)
def test_low_rank_factors_are_exact(case: str) -> None:
    update = trained(case)
    factors = update.low_rank_factors()
    if factors is None:
        assert case == "dense"
        return
    torch.testing.assert_close(factors.up @ factors.down, (update.merge(weight()) - weight()).detach())


class _Saved:
    """Counts bytes that autograd keeps, except storages that exist anyway."""

    def __init__(self, *known: torch.Tensor) -> None:
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.bytes = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage().data_ptr()
        if key not in self.known:
            self.known.add(key)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_no_dense_weight_is_kept_for_backward(case: str, quantized: bool) -> None:
    layer = AdaptedLinear(
        DenseBase(weight(torch.float32)),
        trained(case, torch.float32),
        quantizer=Affine(bits=4, group_size=32) if quantized else None,
    )
    x = torch.randn(4, IN, requires_grad=True)
    saved = _Saved(x, *layer.parameters(), *layer.buffers())
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
        layer(x)
    # what may remain: the low-rank factors scaled or masked, and a few activations of rank size
    small = 4 * (4 * 8 + OUT * 8 + IN * 4)
    assert saved.bytes <= (0 if quantized else small)
