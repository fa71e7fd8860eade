from __future__ import annotations

import math

import pytest
import torch

from qaft.errors import RecipeError
from qaft.sections import OptimSection
from qaft.train.schedules import make_scheduler, schedule_factor, warmup_steps


def factors(total: int, **options: object) -> list[float]:
    section = OptimSection.model_validate(options)
    return [schedule_factor(step, section, total) for step in range(total + 1)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant", "warmup": 0}, [1, 1, 1, 1, 1]),
        ({"schedule": "constant", "warmup": 3}, [1 / 4, 2 / 4, 3 / 4, 1, 1]),
        ({"schedule": "linear", "warmup": 0}, [1, 3 / 4, 2 / 4, 1 / 4, 0]),
        ({"schedule": "linear", "warmup": 0.5}, [1 / 3, 2 / 3, 1, 1 / 2, 0]),
        ({"schedule": "linear", "warmup": 0, "min_lr": 0.5}, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8]),
        ({"schedule": "cosine", "warmup": 0}, [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)]),
        ({"schedule": "cosine", "warmup": 0, "min_lr": 1}, [1, 1, 1, 1, 1]),
    ],
)
def test_factors_follow_the_closed_form(options: dict[str, object], expected: list[float]) -> None:
    assert factors(4, **options) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_scheduler_gives_step_t_the_factor_of_t(schedule: str) -> None:
    section = OptimSection.model_validate({"schedule": schedule, "warmup": 2, "lr": 0.5, "min_lr": 0.2})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=section.lr)
    scheduler = make_scheduler(optimizer, section, 9)
    for step in range(9):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * schedule_factor(step, section, 9), rel=1e-15)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("warmup", "total", "expected"), [(0, 10, 0), (0.03, 200, 6), (0.5, 1, 0), (0.99, 2, 1), (7, 10, 7)]
)
def test_warmup_below_one_is_a_fraction_and_always_leaves_a_step(warmup: float, total: int, expected: int) -> None:
    assert warmup_steps(OptimSection(warmup=warmup), total) == expected


@pytest.mark.parametrize("warmup", [1.5, 10, 11])
def test_impossible_warmup_is_an_error(warmup: float) -> None:
    with pytest.raises(RecipeError, match=r"optim.warmup=.* below train.steps=10"):
        warmup_steps(OptimSection(warmup=warmup), 10)
