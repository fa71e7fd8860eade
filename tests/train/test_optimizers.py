from __future__ import annotations

import pytest
import torch
from torch import nn

from qaft.errors import RecipeError
from qaft.sections import OptimSection
from qaft.train.groups import param_groups
from qaft.train.optimizers import OPTIMIZERS, make_optimizer

CPU = torch.device("cpu")


def train(name: str, options: dict[str, object], steps: int = 4, size: int = 8192) -> torch.Tensor:
    """Minimise a fixed quadratic; 8192 entries are above the size from which bitsandbytes uses 8 bits."""
    section = OptimSection.model_validate({"name": name, "lr": 1e-2, **options})
    weight = nn.Parameter(torch.linspace(-1, 1, size).reshape(64, -1))
    optimizer = make_optimizer(param_groups([("w", weight)], section), section, CPU)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * weight.square()).sum().backward()
        optimizer.step()
    return weight.detach()


def test_adamw_follows_the_published_recursion() -> None:
    beta1, beta2, eps, decay, lr = 0.8, 0.95, 1e-6, 0.1, 1e-2
    w = torch.linspace(-1, 1, 8192, dtype=torch.float64).reshape(64, -1)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, 5):
        m, v = beta1 * m + (1 - beta1) * w, beta2 * v + (1 - beta2) * w**2
        w = w - lr * decay * w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    ours = train("adamw", {"betas": (beta1, beta2), "eps": eps, "weight_decay": decay})
    torch.testing.assert_close(ours, w.float(), rtol=1e-5, atol=1e-6)


def test_sgd_with_momentum_follows_its_recursion() -> None:
    w, velocity = torch.linspace(-1, 1, 8192).reshape(64, -1), torch.zeros(64, 128)
    for _ in range(4):
        velocity = 0.9 * velocity + w + 0.1 * w
        w = w - 1e-2 * velocity
    torch.testing.assert_close(train("sgd", {"momentum": 0.9, "weight_decay": 0.1}), w)


def test_adafactor_equals_that_of_torch() -> None:
    weight = nn.Parameter(torch.linspace(-1, 1, 8192).reshape(64, -1))
    reference = torch.optim.Adafactor([weight], lr=1e-2)
    for _ in range(4):
        reference.zero_grad()
        (0.5 * weight.square()).sum().backward()
        reference.step()
    torch.testing.assert_close(train("adafactor", {}), weight.detach(), rtol=0, atol=0)


def test_adamw_8bit_stays_near_adamw_with_a_quarter_of_its_state() -> None:
    eight, full = train("adamw_8bit", {"eps": 1e-6}), train("adamw", {"eps": 1e-6})
    # Four steps of at most 1e-2; 8-bit states are about 1 % off.
    assert (eight - full).abs().max() < 4e-3
    assert (eight - full).abs().max() > 0


def test_state_of_adamw_8bit_is_two_bytes_per_parameter() -> None:
    section = OptimSection(name="adamw_8bit")
    weight = nn.Parameter(torch.randn(64, 128))
    optimizer = make_optimizer(param_groups([("w", weight)], section), section, CPU)
    weight.grad = torch.randn(64, 128)
    optimizer.step()
    per_entry = [v for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor) and v.shape == weight.shape]
    assert sum(tensor.nbytes for tensor in per_entry) == 2 * weight.numel()


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_optimizer_on_a_cpu_is_an_error_that_says_what_runs(name: str) -> None:
    with pytest.raises(
        RecipeError, match=f"optim.name={name} .* on cpu these run: adafactor, adamw, adamw_8bit, multiplicative, sgd"
    ):
        train(name, {})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamw", {"momentum": 0.9}, "optim.momentum=0.9 is not used by adamw: remove it, or set optim.name to sgd"),
        ("sgd", {"betas": (0.9, 0.99)}, r"optim.betas=\(0.9, 0.99\) is not used by sgd"),
        ("adafactor", {"eps": 1e-6}, "optim.eps=1e-06 is not used by adafactor"),
    ],
)
def test_option_that_the_optimizer_does_not_use_is_an_error(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(name, options)


def test_every_name_of_the_recipe_has_a_builder() -> None:
    annotation = OptimSection.model_fields["name"].annotation
    assert set(annotation.__args__) == set(OPTIMIZERS)  # type: ignore[union-attr]
