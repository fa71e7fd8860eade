"""Laws that hold for every registered update, over dense and packed bases, in activation space and in weight space."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qaft.bases.base import FrozenLinear, LinearSpec
from qaft.bases.dense import DenseBase
from qaft.compat.exports import SCALINGS, UNBOUNDED_RANK
from qaft.layers.adapted import AdaptedLinear
from qaft.quant.affine import Affine
from qaft.updates import UPDATES
from qaft.updates.base import Update

OUT, IN = 24, 64

CASES = {
    "bank": ("bank", {"rank": 1, "blocks": 3}),
    "dense": ("dense", {}),
    "gsoft": ("gsoft", {"block": 8}),
    "gsoft-isometric": ("gsoft", {"block": 4, "scale": False}),
    "ia3": ("ia3", {}),
    "linchain": ("linchain", {"rank": 3, "depth": 2, "alpha": 5.0}),
    "linchain-plain": ("linchain", {"rank": 3, "depth": 0}),
    "lowrank": ("lowrank", {"rank": 3, "alpha": 5.0}),
    "roco-rows": ("roco", {"rows": 3}),
    "roco-columns": ("roco", {"columns": 4, "choose": "random"}),
    "roco-both": ("roco", {"rows": 2, "columns": 3, "choose": "first"}),
    "roco-scored": ("roco", {"rows": 2, "columns": 3, "choose": "mixed"}),
    "sift": ("sift", {"rate": 0.05, "choose": "random"}),
    "sift-blocks": ("sift", {"rate": 0.2, "entries": "block64", "choose": "random"}),
    "sift-selected": ("sift", {"rate": 0.02}),
    "ssb": ("ssb", {}),
    "ssb-tied": ("ssb", {"tie": True}),
    "ssl": ("ssl", {}),
}


def test_every_registered_update_has_a_contract_case() -> None:
    assert {kind for kind, _ in CASES.values()} == set(UPDATES)


def make(case: str, dtype: torch.dtype = torch.float64, *, scores_seed: int = 3):
    kind, options = CASES[case]
    generator = torch.Generator().manual_seed(scores_seed)
    entries = UPDATES[kind].entry_choice(**options)
    spec = LinearSpec(
        name="model.layers.0.self_attn.q_proj",
        out_features=OUT,
        in_features=IN,
        dtype=dtype,
        num_heads=4,
        row_scores=torch.rand(OUT, generator=generator),
        column_scores=torch.rand(IN, generator=generator),
        places=None if entries is None else entries.largest(torch.randn(OUT, IN, generator=generator)),
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


class _Merge(torch.nn.Module):
    """``update.merge`` as a forward pass, which ``functional_call`` can call."""

    def __init__(self, update: Update) -> None:
        super().__init__()
        self.update = update

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.update.merge(weight)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_the_tangent_is_the_derivative_of_the_output(case: str, base: FrozenLinear, generator: torch.Generator) -> None:
    update, x = trained(case), torch.randn(5, 7, IN, dtype=torch.float64)
    directions = {n: torch.randn(p.shape, generator=generator).double() for n, p in update.named_parameters()}
    for some in (directions, dict(list(directions.items())[:1])):
        ends = []
        for step in (1e-5, -1e-5):
            moved = {n: p + step * some[n] for n, p in update.named_parameters() if n in some}
            ends.append(torch.func.functional_call(update, moved, (x, base.matmul)))
        expected = (ends[0] - ends[1]) / 2e-5
        found = update.tangent(x, base.matmul, some)
        # Numerical derivatives have an error of (2^-8)^2, exact ones only that of this test's own difference.
        numerical = type(update).tangent is Update.tangent
        assert float((found - expected).norm() / expected.norm()) < (1e-3 if numerical else 1e-8)


@torch.no_grad()
def test_a_numerical_tangent_agrees_with_an_exact_one(base: FrozenLinear, generator: torch.Generator) -> None:
    update, x = trained("lowrank"), torch.randn(5, IN, dtype=torch.float64)
    directions = {n: torch.randn(p.shape, generator=generator).double() for n, p in update.named_parameters()}
    torch.testing.assert_close(
        Update.tangent(update, x, base.matmul, directions), update.tangent(x, base.matmul, directions)
    )


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
def test_state_loaded_into_an_update_built_from_other_scores_gives_the_same_function(
    case: str, base: FrozenLinear
) -> None:
    update, other = trained(case), make(case, scores_seed=4)
    other.load_state_dict(update.state_dict())
    x = torch.randn(5, IN, dtype=torch.float64)
    assert torch.equal(update(x, base.matmul), other(x, base.matmul))
    assert torch.equal(update.merge(weight()), other.merge(weight()))


@pytest.mark.parametrize("case", CASES)
def test_low_rank_factors_are_exact(case: str) -> None:
    update = trained(case)
    factors = update.low_rank_factors()
    assert (factors is None) == (CASES[case][0] in UNBOUNDED_RANK)
    if factors is None:
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
    # What may remain: the low-rank factors scaled or masked, a few activations of rank size, two inverses of blocks of 8.
    small = 4 * (4 * 8 + OUT * 8 + IN * 4 + (2 * IN * 8 if case.startswith("gsoft") else 0))
    assert saved.bytes <= (0 if quantized else small)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_have_a_row_for_each_token(case: str) -> None:
    # By columns, all that reads them, as far as the activations of the next layer, is some five times as slow.
    layer = AdaptedLinear(DenseBase(weight(torch.float32)), trained(case, torch.float32))
    x = torch.randn(2, 5, IN, requires_grad=True)
    y = layer(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.is_contiguous()
    assert grad.is_contiguous()


@pytest.mark.parametrize("case", CASES)
def test_rows_that_an_update_does_not_touch_are_left_bit_for_bit(case: str) -> None:
    update, before = trained(case), weight()
    rows = update.touched_rows()
    changed = (update.merge(before).detach() != before).any(dim=1).nonzero().flatten()
    expected = torch.arange(OUT) if rows is None else rows
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("case", CASES)
def test_channel_changes_are_all_that_a_scaling_does(case: str) -> None:
    update, before = trained(case), weight()
    changes = update.channel_changes()
    assert (changes is not None) == (CASES[case][0] in SCALINGS)
    if changes is not None:
        outputs = torch.zeros(OUT) if changes.outputs is None else changes.outputs.detach()
        inputs = torch.zeros(IN) if changes.inputs is None else changes.inputs.detach()
        expected = (1 + outputs).unsqueeze(1) * before * (1 + inputs)
        torch.testing.assert_close(update.merge(before).detach(), expected, rtol=1e-14, atol=0)
