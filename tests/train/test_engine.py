from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TinyBatches, TinyCausalLM, make_run, values
from torch import nn

from qaft.errors import RecipeError
from qaft.train.engine import AccelerateEngine, StepInfo


class Square(nn.Module):
    """sum of (w x)^2, gradient 2 w x^2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, 4.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.w * x).square().sum()


def one_step(**options: Any) -> tuple[StepInfo, torch.Tensor]:
    module = Square()
    engine = AccelerateEngine(module, torch.optim.SGD(module.parameters(), lr=1.0), cpu=True, **options)
    for _ in range(options.get("accumulation", 1)):
        assert not engine.due
        engine.backward(engine(x=torch.tensor(0.5)))
    assert engine.due
    return engine.step(), module.w.detach()


@pytest.mark.parametrize(
    ("options", "norm", "weight"),
    [
        ({}, 2.5, [1.5, 2.0]),
        ({"accumulation": 3}, 7.5, [-1.5, -2.0]),
        ({"clip": 0.5}, 2.5, [2.7, 3.6]),
        ({"clip": 10.0}, 2.5, [1.5, 2.0]),
        ({"loss_scale": 1024.0}, 2.5, [1.5, 2.0]),
        ({"loss_scale": 1024.0, "clip": 0.5, "accumulation": 2}, 5.0, [2.7, 3.6]),
    ],
)
def test_step_reports_the_norm_before_clipping_and_steps_the_clipped_gradient(
    options: dict[str, Any], norm: float, weight: list[float]
) -> None:
    info, stepped = one_step(**options)
    assert info.stepped
    assert info.grad_norm == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(stepped, torch.tensor(weight), rtol=1e-5, atol=1e-6)


def test_norm_that_is_not_finite_steps_nothing_and_clears_the_gradients() -> None:
    module = Square()
    engine = AccelerateEngine(module, torch.optim.SGD(module.parameters(), lr=1.0), cpu=True, clip=1.0)
    engine.backward(engine(x=torch.tensor(1e30)))
    info = engine.step()
    assert (info.stepped, info.grad_norm) == (False, float("inf"))
    assert module.w.tolist() == [3.0, 4.0]
    assert module.w.grad is None
    assert not engine.due


def test_none_inputs_are_left_to_the_default_of_the_module() -> None:
    class Optional(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 3.0) -> torch.Tensor:
            return x * scale

    parameter = nn.Parameter(torch.ones(1))
    engine = AccelerateEngine(Optional(), torch.optim.SGD([parameter], lr=1.0), cpu=True)
    assert engine(x=torch.ones(1), scale=None).item() == 3.0


def test_half_precision_gradients_underflow_without_a_loss_scale_and_not_with_it(tmp_path: Path) -> None:
    batch = next(iter(TinyBatches(steps=1).from_step(0)))
    norms = {}
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 1.0), (torch.float16, 1024.0)):
        model = TinyCausalLM().to(dtype)
        run = make_run(tmp_path, model=model, engine_options={"loss_scale": scale})
        # Brings the hidden gradients of this model near the smallest fp16 number, 6e-8.
        run.engine.backward(run.engine(input_ids=batch.input_ids, labels=batch.labels) / 4e6)
        gradients = [p.grad.float() / scale for p in run.params.values() if p.grad is not None]
        norms[dtype, scale] = float(torch.stack([g.norm() for g in gradients]).norm())
    exact = norms[torch.float32, 1.0]
    assert norms[torch.float16, 1024.0] == pytest.approx(exact, rel=1e-3)
    assert abs(norms[torch.float16, 1.0] - exact) > 0.2 * exact


def test_bf16_model_with_fp32_trainables_keeps_both_dtypes_without_autocast(tmp_path: Path) -> None:
    class Adapter(nn.Module):
        """A bf16 frozen linear with an fp32 trained row vector, as updates are built."""

        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base.to(torch.bfloat16).requires_grad_(False)
            self.up = nn.Parameter(torch.zeros(base.out_features))
            self.seen: list[tuple[torch.dtype, bool]] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
            return self.base(x) + self.up.to(x.dtype)

    model = TinyCausalLM().to(torch.bfloat16).requires_grad_(False)
    model.model.v_proj = Adapter(model.model.v_proj)  # type: ignore[assignment]
    run = make_run(tmp_path, model=model)
    batch = next(iter(run.batches.from_step(0)))
    loss = run.objective(run.engine, batch, seed=0)
    run.engine.backward(loss)
    (up,) = run.params.values()
    assert loss.dtype == up.dtype == torch.float32
    assert up.grad is not None and up.grad.dtype == torch.float32
    assert run.engine.step().grad_norm > 0
    assert up.detach().any()
    assert model.model.v_proj.seen == [(torch.bfloat16, False)]  # type: ignore[union-attr]
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_frozen_parameters_get_no_gradient(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    before = values(run)
    batch = next(iter(run.batches.from_step(0)))
    run.engine.backward(run.objective(run.engine, batch, seed=0))
    assert all((p.grad is not None) == p.requires_grad for p in run.engine.module.parameters())
    run.engine.step()
    assert all(not torch.equal(before[name], param) for name, param in run.params.items())


def test_tracker_whose_package_is_missing_is_an_error() -> None:
    module = Square()
    with pytest.raises(RecipeError, match=r"train.report_to: aim cannot be imported"):
        AccelerateEngine(module, torch.optim.SGD(module.parameters(), lr=1.0), cpu=True, report_to=["aim"])


def test_unknown_tracker_is_an_error(tmp_path: Path) -> None:
    module = Square()
    with pytest.raises(
        RecipeError, match=r"train.report_to: 'tensorbord' must be one of .*; did you mean 'tensorboard'"
    ):
        AccelerateEngine(
            module, torch.optim.SGD(module.parameters(), lr=1.0), cpu=True, report_to=["tensorbord"], folder=tmp_path
        )


def test_tensorboard_receives_values_and_the_flattened_recipe(tmp_path: Path) -> None:
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    module = Square()
    engine = AccelerateEngine(
        module, torch.optim.SGD(module.parameters(), lr=1.0), cpu=True, report_to=["tensorboard"], folder=tmp_path
    )
    engine.start_trackers("run", {"optim": {"lr": 0.5, "betas": [0.9, 0.99]}, "qat": None})
    engine.track({"loss": 1.25}, step=7)
    engine.end_trackers()
    (events,) = (tmp_path / "run").glob("events*")
    accumulator = event_file.EventAccumulator(str(events)).Reload()
    (scalar,) = accumulator.Scalars("loss")
    assert (scalar.step, scalar.value) == (7, 1.25)
    assert "optim.lr: 0.5" in next((tmp_path / "run").rglob("hparams.yml")).read_text()
