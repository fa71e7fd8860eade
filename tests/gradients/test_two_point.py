"""What all zeroth-order sources share: statistics, masking, epsilon, and the same step from its scalars alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from toy_closure import ToyClosure

from qaft.errors import TrainingError
from qaft.gradients import SOURCES
from qaft.gradients.base import PairedLosses
from qaft.gradients.epsilon import WANTED_RATIO, check_epsilon, choose_epsilon
from qaft.gradients.mezo import Mezo
from qaft.gradients.projection import Projection, StepSums
from qaft.gradients.spsa import Spsa
from qaft.gradients.two_point import TwoPointSource

KINDS = {kind: cls for kind, cls in SOURCES.items() if issubclass(cls, TwoPointSource)}


def params() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"model.{layer}.update.blocks.0": nn.Parameter(torch.randn(5, 2, generator=generator, dtype=torch.float64))
        for layer in "ab"
    }


def quadratic(values) -> Tensor:
    """Losses of six examples."""
    flat = torch.cat([v.flatten() for v in values.values()])
    weights = torch.linspace(-1, 2, 6, dtype=flat.dtype)[:, None] * torch.linspace(0.5, 1, len(flat), dtype=flat.dtype)
    return (weights * flat + weights.abs() * flat.square()).sum(1)


def true_gradient(values) -> dict[str, Tensor]:
    loss = quadratic(values).mean()
    return dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_quadratic_the_scalar_is_the_exact_directional_derivative(kind: str) -> None:
    values, source = params(), KINDS[kind](epsilon=0.25, outlier=None)
    closure = ToyClosure(values, quadratic)
    estimate = source(closure, values)
    [direction], epsilon = closure.probes[-1]
    assert epsilon == 0.25
    gradient = true_gradient(values)
    expected = sum(float((gradient[n] * u).sum()) for n, u in direction.items())
    assert estimate.scalars == pytest.approx((expected,), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_surrogate_of_the_scalars_is_the_surrogate_of_the_step(kind: str) -> None:
    values = params()
    estimate = KINDS[kind](epsilon=0.25)(ToyClosure(values, quadratic, step=7, run_seed=3), values)
    estimate.surrogate.backward()
    first = {n: p.grad.clone() for n, p in values.items() if p.grad is not None}
    again = params()
    KINDS[kind]().surrogate(again, seed=3, step=7, scalars=estimate.scalars).backward()
    assert first.keys() == {n for n, p in again.items() if p.grad is not None}
    assert all(torch.equal(first[n], again[n].grad) for n in first)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_give_the_scalar_of_the_whole_batch_and_a_zero_before_it(kind: str) -> None:
    values = params()
    whole = KINDS[kind](epsilon=0.25)(ToyClosure(values, quadratic), values)
    parts = KINDS[kind](epsilon=0.25)
    first = parts(ToyClosure(values, lambda v: quadratic(v)[:2], is_last=False), values)
    assert first.scalars == ()
    first.surrogate.backward()
    assert all(p.grad is None or not p.grad.any() for p in values.values())
    last = parts(ToyClosure(values, lambda v: quadratic(v)[2:]), values)
    assert last.scalars == pytest.approx(whole.scalars, rel=1e-12)
    assert last.metrics["projected_gradient_se"] == pytest.approx(whole.metrics["projected_gradient_se"], rel=1e-9)
    assert float(last.loss) == pytest.approx(float(whole.loss), rel=1e-12)


def test_mezo_draws_normal_numbers_and_spsa_signs() -> None:
    values = {"w": nn.Parameter(torch.zeros(300, 40))}
    normal = Mezo().draw(values, seed=0, step=0, number=0, purpose="probe")["w"]
    assert float(normal.mean()) == pytest.approx(0, abs=0.04)
    assert float(normal.square().mean()) == pytest.approx(1, abs=0.05)
    assert float(normal.pow(4).mean()) == pytest.approx(3, abs=0.3)
    assert Spsa().draw(values, seed=0, step=0, number=0, purpose="probe")["w"].abs().eq(1).all()


def test_several_directions_add_up_to_an_unbiased_estimate() -> None:
    values, gradient = params(), true_gradient(params())
    total = {n: torch.zeros_like(p) for n, p in values.items()}
    count, directions = 600, 4
    for step in range(count):
        source = Spsa(epsilon=0.25, directions=directions)
        estimate = source(ToyClosure(values, quadratic, step=step), values)
        drawn = source.gradient(values, seed=0, step=step, scalars=estimate.scalars)
        for name in total:
            total[name] += drawn[name] / count
    size = torch.cat([g.flatten() for g in gradient.values()])
    error = torch.cat([(total[n] - gradient[n]).flatten() for n in total])
    # 20 coordinates: E|estimate|^2 = 20 |G|^2 for one direction.
    assert float(error.norm() / size.norm()) < 1.5 * math.sqrt(20 / (count * directions))


# -- statistics ---------------------------------------------------------------------------------------------------------


def losses(count: int = 50) -> PairedLosses:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(1, 6, (count,), generator=generator)
    difference = 0.3 * targets + torch.randn(count, generator=generator, dtype=torch.float64)
    middle = torch.full((count,), 2.0, dtype=torch.float64)
    return PairedLosses(
        middle + difference / 2, middle - difference / 2, targets, torch.zeros(count, dtype=torch.int64)
    )


def test_the_standard_error_is_that_of_a_ratio_of_sums() -> None:
    pair, epsilon = losses(), 0.5
    [projection] = StepSums.zeros(1).add(pair, [0]).projections
    d, n = (pair.plus - pair.minus), pair.targets.double()
    ratio = float(d.sum() / n.sum())
    residual = d - ratio * n
    expected = math.sqrt(float(residual.square().sum()) * 50 / 49) / float(n.sum())
    assert projection.scalar(epsilon, float(n.sum())) == pytest.approx(ratio)
    assert projection.standard_error(epsilon, float(n.sum())) == pytest.approx(expected, rel=1e-9)


def test_the_standard_error_is_the_spread_over_resampled_batches() -> None:
    pair, generator, found = losses(), torch.Generator().manual_seed(0), []
    d, n = pair.plus - pair.minus, pair.targets.double()
    for _ in range(2000):
        chosen = torch.randint(0, 50, (50,), generator=generator)
        found.append(float(d[chosen].sum() / n[chosen].sum()))
    [projection] = StepSums.zeros(1).add(pair, [0]).projections
    spread = torch.tensor(found).std()
    assert projection.standard_error(0.5, float(n.sum())) == pytest.approx(float(spread), rel=0.1)


def test_the_shuffled_scalar_is_the_mean_over_all_signs_of_the_examples_differences() -> None:
    pair, few = losses(), slice(0, 10)
    rest = PairedLosses(*(field[few] for field in (pair.plus, pair.minus, pair.targets, pair.direction)))
    [projection] = StepSums.zeros(1).add(rest, [0]).projections
    patterns = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 10)
    scalars = patterns @ (rest.plus - rest.minus) / (2 * 0.5 * float(rest.targets.sum()))
    found = projection.control(0.5, float(rest.targets.sum()))
    assert found == pytest.approx(float(scalars.square().mean().sqrt()), rel=1e-12)


def test_examples_that_agree_exceed_the_shuffled_scalar_by_the_root_of_their_number() -> None:
    agreeing = PairedLosses(
        torch.full((16,), 2.0, dtype=torch.float64),
        torch.ones(16, dtype=torch.float64),
        torch.ones(16, dtype=torch.int64),
        torch.zeros(16, dtype=torch.int64),
    )
    [projection] = StepSums.zeros(1).add(agreeing, [0]).projections
    assert projection.scalar(0.5, 16.0) == pytest.approx(4 * projection.control(0.5, 16.0))
    assert projection.control(0.5, 0.0) == 0.0


def test_one_example_has_no_standard_error() -> None:
    assert math.isnan(Projection(examples=1.0, targets=3.0).standard_error(0.1, 3.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_example_that_is_not_finite_is_left_out_of_every_sum(bad: float) -> None:
    pair = losses()
    pair.minus[7] = bad
    kept = torch.arange(50) != 7
    rest = PairedLosses(*(field[kept] for field in (pair.plus, pair.minus, pair.targets, pair.direction)))
    with_bad, without = StepSums.zeros(1).add(pair, [0]), StepSums.zeros(1).add(rest, [0])
    assert with_bad.left_out == 1
    assert with_bad.projections == without.projections
    assert with_bad.loss == without.loss


def test_a_step_of_losses_that_are_not_finite_moves_nothing_and_reports_nan() -> None:
    values = params()
    source = Spsa(epsilon=0.25)
    source(ToyClosure(values, quadratic), values)
    estimate = source(ToyClosure(values, lambda v: quadratic(v) * math.nan), values)
    assert estimate.scalars == (0.0,)
    assert math.isnan(float(estimate.loss))


def test_sums_over_ranks_are_added_field_by_field() -> None:
    first, second = StepSums.zeros(2).add(losses(), [0]), StepSums.zeros(2).add(losses(30), [1])
    together = StepSums.over_ranks([first.flat(), second.flat()])
    assert together.projections == (first.projections[0], second.projections[1])
    assert together.targets == first.targets + second.targets
    assert together.loss == first.loss + second.loss


def test_an_outlier_is_masked_until_the_mean_has_followed() -> None:
    values, source = params(), Spsa(epsilon=0.25, outlier=20.0)
    for step in range(20):
        source(ToyClosure(values, quadratic, step=step), values)
    masked = []
    for step in range(20, 60):
        estimate = source(ToyClosure(values, lambda v: 1e3 * quadratic(v), step=step), values)
        masked.append(estimate.metrics["masked_directions"])
    assert masked[0] == 1
    assert masked[-1] == 0
    assert 1 < sum(masked) < 40


# -- epsilon ------------------------------------------------------------------------------------------------------------


def rounded(slope: float, unit: float):
    """Losses of many examples of this slope, rounded to multiples of ``unit``."""
    offsets = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def differences(epsilon: float) -> Tensor:
        plus, minus = (((offsets + sign * slope * epsilon) / unit).round() * unit for sign in (1, -1))
        return plus - minus

    return differences


def same(values: list[float]) -> list[float]:
    return values


@pytest.mark.parametrize("unit", [1e-5, 1e-4, 1e-3])
def test_the_chosen_epsilon_is_the_smallest_with_thirty_times_the_rounding(unit: float) -> None:
    found = choose_epsilon(rounded(1.0, unit), same)
    assert found.ratio >= WANTED_RATIO
    assert math.log2(found.value).is_integer()
    # Rounding of a difference: two errors of unit / sqrt(12).
    error = unit / math.sqrt(6)
    assert 2 * found.value / error > 0.6 * WANTED_RATIO
    assert 2 * (found.value / 4) / error < WANTED_RATIO


def test_the_measured_ratio_is_that_of_the_rounding() -> None:
    found = check_epsilon(0.01013, rounded(1.0, 1e-3), same)
    assert found.ratio == pytest.approx(0.02026 / (1e-3 / math.sqrt(6)), rel=0.4)


@pytest.mark.parametrize("unit", [1e-2, 10.0])
def test_an_epsilon_that_drowns_is_refused(unit: float) -> None:
    with pytest.raises(TrainingError, match=r"gradient\.epsilon=0\.001: .*times its rounding.*auto"):
        check_epsilon(1e-3, rounded(1.0, unit), same)


def test_a_loss_that_no_epsilon_moves_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"epsilon=auto: no step from 0\.0001"):
        choose_epsilon(lambda epsilon: torch.zeros(5), same)


def test_epsilon_is_measured_once_and_continues_with_the_state() -> None:
    values, source = params(), Spsa()
    closure = ToyClosure(values, quadratic)
    source(closure, values)
    measured = len(closure.probes)
    assert measured > 1
    other = Spsa()
    other.load_state_dict(source.state_dict())
    for continued in (source, other):
        closure = ToyClosure(values, quadratic, step=1)
        continued(closure, values)
        assert len(closure.probes) == 1
        assert continued.epsilon == source.epsilon
