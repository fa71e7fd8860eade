from __future__ import annotations

import pytest
import torch
from torch import nn

from qaft.errors import RecipeError
from qaft.sections import OptimSection
from qaft.train.groups import param_groups
from qaft.train.optimizers import make_optimizer
from qaft.train.schedules import make_scheduler

NAMES = [
    f"model.layers.{layer}.self_attn.{module}.update.{factor}"
    for layer in (1, 10)
    for module in ("q_proj", "v_proj")
    for factor in ("down", "up")
]


def parameters(names: list[str] = NAMES) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.full((2,), float(i))) for i, name in enumerate(names)}


def grouped(lr_scale: dict[str, float], params: dict[str, nn.Parameter]) -> dict[str, tuple[float, list[str]]]:
    names = {id(param): name for name, param in params.items()}
    groups = param_groups(params.items(), OptimSection(lr=1e-3, lr_scale=lr_scale))
    return {g["name"]: (g["lr"], [names[id(p)] for p in g["params"]]) for g in groups}


def test_without_patterns_everything_is_in_the_base_group() -> None:
    assert grouped({}, parameters()) == {"base": (1e-3, NAMES)}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("v_proj$", [n for n in NAMES if ".v_proj." in n]),
        ("v_proj", [n for n in NAMES if ".v_proj." in n]),
        ("self_attn.v_proj", [n for n in NAMES if ".v_proj." in n]),
        ("layers.1", [n for n in NAMES if ".1." in n]),
        ("layers.(1|10)", NAMES),
        (".*_proj", NAMES),
        ("q_proj.update.up", [n for n in NAMES if n.endswith("q_proj.update.up")]),
        (r"model\..*\.10\..*v_proj", [n for n in NAMES if ".10." in n and "v_proj" in n]),
    ],
)
def test_pattern_covers_whole_components_of_a_module_name(pattern: str, expected: list[str]) -> None:
    assert grouped({pattern: 4.0}, parameters())[pattern] == (4e-3, expected)


def test_groups_are_a_partition_of_the_trainable_parameters() -> None:
    params = parameters([*NAMES, "model.norm.weight"])
    params["model.norm.weight"].requires_grad_(False)
    groups = grouped({"v_proj": 4.0, "layers.1.self_attn.q_proj": 0.5}, params)
    assert sorted(name for _, names in groups.values() for name in names) == sorted(NAMES)


def test_base_group_is_left_out_when_patterns_cover_everything() -> None:
    assert list(grouped({"q_proj": 1.0, "v_proj": 4.0}, parameters())) == ["q_proj", "v_proj"]


@pytest.mark.parametrize("pattern", ["v_pro", "_proj", "proj", "v_projection"])
def test_pattern_that_matches_nothing_is_an_error_with_near_names(pattern: str) -> None:
    with pytest.raises(RecipeError, match=r"optim.lr_scale: '.*' matches no trainable parameter .*_proj"):
        grouped({pattern: 2.0}, parameters())


def test_pattern_for_a_frozen_module_is_an_error() -> None:
    params = parameters([*NAMES, "model.norm.weight"])
    params["model.norm.weight"].requires_grad_(False)
    with pytest.raises(RecipeError, match="'norm' matches no trainable"):
        grouped({"norm": 2.0}, params)


def test_two_patterns_for_one_parameter_are_an_error() -> None:
    with pytest.raises(RecipeError, match=r"'v_proj' and 'layers.10' both match model.layers.10.self_attn.v_proj"):
        grouped({"v_proj": 4.0, "layers.10": 2.0}, parameters())


def test_broken_regular_expression_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"optim.lr_scale: '\(v_proj' is not a regular expression"):
        grouped({"(v_proj": 4.0}, parameters())


def test_nothing_trainable_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no parameter is trainable"):
        grouped({}, {"w": nn.Parameter(torch.zeros(1), requires_grad=False)})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 3, 0.2])
@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_ratio_of_two_groups_survives_every_step_of_every_schedule(schedule: str, warmup: float, name: str) -> None:
    section = OptimSection.model_validate(
        {"name": name, "lr": 1e-3, "lr_scale": {"v_proj": 4.0}, "schedule": schedule, "warmup": warmup, "min_lr": 0.1}
    )
    params = parameters()
    optimizer = make_optimizer(param_groups(params.items(), section), section, torch.device("cpu"))
    scheduler = make_scheduler(optimizer, section, 10)
    for _ in range(10):
        base, scaled = optimizer.param_groups
        assert scaled["lr"] == pytest.approx(4 * base["lr"], rel=1e-12)
        assert base["lr"] > 0
        for param in params.values():
            param.grad = torch.ones_like(param)
        optimizer.step()
        scheduler.step()


def test_factor_on_the_rate_equals_a_reparametrisation_for_sgd() -> None:
    # w = sqrt(f) u with u at rate lr moves w as rate f lr does.
    factor, section = 4.0, OptimSection(name="sgd", lr=0.1, lr_scale={"w": 4.0})
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    u = nn.Parameter(w.detach() / factor**0.5)
    optimizer = make_optimizer(param_groups([("w", w)], section), section, torch.device("cpu"))
    plain = torch.optim.SGD([u], lr=0.1)
    for _ in range(5):
        for value, param, step in ((w, w, optimizer), (factor**0.5 * u, u, plain)):
            step.zero_grad()
            (value**4).sum().backward(inputs=[param])
            step.step()
    torch.testing.assert_close(w.detach(), factor**0.5 * u.detach(), rtol=1e-12, atol=0)
