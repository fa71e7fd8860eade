"""PACE against its definition: where the noise acts, what it is shared over, and what the loss is."""

from __future__ import annotations

import pytest
import torch
from tiny_regularized import HIDDEN, Model, batch, logits, regularized
from torch import Tensor

from qaft.layers.attach import adapted_layers
from qaft.layers.passes import noisy
from qaft.regularizers.pace import Pace
from qaft.train.loss import CausalLoss

EXACT = {"variant": "exact", "weight": 1.0}


def value(model: Model, term: Pace, step: int = 0, rows: int = 4) -> Tensor:
    whole = regularized(model, [term])
    whole.step = step
    torch.manual_seed(7)
    return whole(**batch(rows))


@pytest.mark.parametrize("variant", ["exact", "lazy_half"])
def test_without_noise_the_loss_is_the_plain_one(variant: str) -> None:
    model = Model(dropout=0.5, dtype=torch.float64)
    torch.manual_seed(7)
    plain = CausalLoss(model)(**batch())
    step = 0 if variant == "exact" else 1
    torch.testing.assert_close(value(model, Pace(sigma=0.0, variant=variant), step), plain)


@pytest.mark.parametrize("quantized", [False, True])
def test_without_an_update_there_is_nothing_that_noise_could_change(quantized: bool) -> None:
    model = Model(quantized=quantized, trained=False)
    plain = CausalLoss(model)(**batch())
    torch.testing.assert_close(value(model, Pace(sigma=2.0, **EXACT)), plain, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_loss_is_that_of_the_first_pass_plus_the_squared_distance_to_the_second(quantized: bool) -> None:
    model, term = Model(quantized=quantized, dtype=torch.float64), Pace(sigma=0.7, variant="exact", weight=0.3)
    found = value(model, term)
    torch.manual_seed(7)
    seed, layers = int(torch.randint(2**62, ())), adapted_layers(model)
    with noisy(layers, term.sigmas, seed):
        plain, first = CausalLoss(model)(**batch()), logits(model)
    with noisy(layers, term.sigmas, seed + 1):
        second = logits(model)
    expected = plain + 0.3 * (first - second).square().sum()
    torch.testing.assert_close(found, expected)
    parameters = [p for layer in layers.values() for p in layer.update.parameters()]
    for a, b in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b)
    assert float((first - second).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", ["lowrank", "ssb", "dense"])
def test_noise_multiplies_what_the_update_adds_once_for_all_tokens_of_a_sample(kind: str, quantized: bool) -> None:
    layer = adapted_layers(Model(kind, quantized=quantized, dtype=torch.float64))["model.layers.0.proj"]
    x = torch.randn(3, 5, HIDDEN, dtype=torch.float64)
    clean = layer(x)
    layer.shows = "base"
    base = layer(x)
    layer.shows = "trained"
    with noisy({"l": layer}, {"l": 0.5}, seed=1):
        first, again = layer(x), layer(x)
    with noisy({"l": layer}, {"l": 0.5}, seed=2):
        other = layer(x)
    factor = ((first - base) / (clean - base)).detach()
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), atol=1e-6, rtol=1e-6)
    assert float((factor[0, 0] - factor[1, 0]).abs().max()) > 0.1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_noise_has_mean_1_and_the_given_spread() -> None:
    layer = adapted_layers(Model(dtype=torch.float64))["model.layers.0.proj"]
    with noisy({"l": layer}, {"l": 0.5}, seed=1):
        assert layer.noise is not None
        drawn = layer.noise(torch.zeros(4000, 3, 16, dtype=torch.float64))
    assert drawn.shape == (4000, 1, 16)
    assert abs(float(drawn.mean()) - 1) < 0.01
    assert abs(float(drawn.std()) - 0.5) < 0.01


def test_there_is_no_noise_in_evaluation_and_none_stays_behind() -> None:
    model = Model()
    layers = adapted_layers(model)
    expected = logits(model)
    model.eval()
    with noisy(layers, dict.fromkeys(layers, 1.0), seed=1):
        assert torch.equal(logits(model), expected)
    model.train()
    value(model, Pace(**EXACT))
    assert torch.equal(logits(model), expected)


def test_noise_falls_linearly_with_depth_over_the_blocks_that_are_trained() -> None:
    names = [f"model.layers.{i}.self_attn.{p}" for i in (4, 7, 9, 20) for p in ("q_proj", "v_proj")]
    layer = next(iter(adapted_layers(Model()).values()))
    term = Pace(sigma=0.8)
    term.prepare(dict.fromkeys(names, layer))
    # linspace(0, sigma, n + 1)[-1:0:-1], the official code's schedule
    expected = torch.linspace(0, 0.8, 5).flip(0)[:-1].repeat_interleave(2).tolist()
    assert [term.sigmas[name] for name in names] == pytest.approx(expected)


def test_both_passes_have_the_same_dropout_masks() -> None:
    # Noise of size 0 leaves dropout as the only difference that there could be.
    model = Model(dropout=0.5, dtype=torch.float64)
    torch.manual_seed(7)
    plain = CausalLoss(model)(**batch())
    torch.testing.assert_close(value(model, Pace(sigma=0.0, variant="exact", weight=1e6)), plain)


@pytest.mark.parametrize(("step", "passes"), [(0, [2, 2]), (1, [4]), (2, [4]), (3, [2, 2])])
def test_lazy_half_runs_as_many_rows_as_a_plain_step(step: int, passes: list[int]) -> None:
    model = Model()
    value(model, Pace(interval=3), step)
    assert model.model.rows == passes


def test_half_a_batch_counts_as_the_whole_one() -> None:
    model, term = Model(dtype=torch.float64), Pace(sigma=0.5, weight=0.2)
    found = value(model, term)
    half = value(model, Pace(sigma=0.5, weight=0.2, variant="exact"), rows=4)
    assert float((found - half).detach().abs()) > 1e-6
    whole = regularized(model, [Pace(sigma=0.5, weight=0.2, variant="exact")])
    torch.manual_seed(7)
    given = {name: tensor[:2] for name, tensor in batch().items()}
    targets = [int((b["labels"][:, 1:] != -100).sum()) for b in (batch(), given)]
    torch.testing.assert_close(found, whole(**given) * targets[0] / targets[1])


def test_fast_compares_a_sample_with_its_last_pass_and_runs_every_row_once() -> None:
    model, term = Model(dtype=torch.float64), Pace(sigma=0.5, variant="fast", weight=0.3)
    whole, layers = regularized(model, [term]), adapted_layers(model)
    torch.manual_seed(7)
    seeds, passes, values = [], [], []
    for step in (0, 9):
        with torch.random.fork_rng(devices=[]):
            seeds.append(int(torch.randint(2**62, ())))
        whole.step = step
        values.append(whole(**batch()))
        with noisy(layers, term.sigmas, seeds[-1]):
            passes.append((CausalLoss(model)(**batch()), logits(model)))
        torch.rand(1)
        next(iter(layers.values())).update.up.data += 0.1
    (plain, before), (later_plain, now) = passes
    torch.testing.assert_close(values[0], plain)
    expected = later_plain + 0.3 * (now - before.detach()).square().sum()
    torch.testing.assert_close(values[1], expected)
    assert seeds[0] != seeds[1]
    assert model.model.rows == [4] * 6


def test_fast_has_the_gradient_of_the_new_pass_alone() -> None:
    model, term = Model(dtype=torch.float64), Pace(sigma=0.0, variant="fast", weight=0.3)
    whole = regularized(model, [term])
    whole(**batch())
    before = logits(model).detach()
    up = next(iter(adapted_layers(model).values())).update.up
    up.data += 0.1
    whole.step = 1
    expected = CausalLoss(model)(**batch()) + 0.3 * (logits(model) - before).square().sum()
    (found,), (wanted,) = torch.autograd.grad(whole(**batch()), up), torch.autograd.grad(expected, up)
    torch.testing.assert_close(found, wanted)


def test_one_row_is_never_halved_to_none() -> None:
    assert Pace().rows(1, 0) == 1


@pytest.mark.parametrize("options", [{"weight": 0}, {"sigma": -1}, {"variant": "slow"}, {"interval": 0}])
def test_impossible_options_are_refused_with_what_is_allowed(options) -> None:
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=rf"^{name}=.* must be"):
        Pace(**options)
