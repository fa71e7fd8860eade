"""What zeroth-order training leaves untouched, to the bit, and what it needs.

Where the numbered properties of zeroth-order training are tested:

     1 unbiased, 2 second moment       gradients/test_lozo.py
     3 subspaces and rank              test_zeroth_order.py
     4 published code, 5 learning rate gradients/test_lozo.py
     6 momentum                        gradients/test_lozo.py
     7 nothing to restore              here, test_zeroth_order_long.py (10,000 steps)
     8 both signs in one batch         here (fp64), test_zeroth_order.py (fp32, bf16), layers/test_probe.py
     9 batches                         test_zeroth_order.py
    10 journal                         test_replay.py, test_zeroth_order_long.py (2,000 steps)
    11 processes                       test_zeroth_order_ranks.py
    12 who learns                      test_zeroth_order.py, benchmarks/lozo_convergence.py
    13 memory and bytes written        here, benchmarks/lozo_step.py
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_zeroth_order import EPS, closure_of, direction_of, first_batches, in_place, prepared, scalar
from tiny_job import job
from torch import Tensor

from qaft.build import build_run
from qaft.gradients.epsilon import Epsilon
from qaft.recipe import parse_recipe
from qaft.train.closure import BatchClosure
from qaft.train.journal import base_digest
from qaft.train.replay import two_point
from qaft.training import prepare_replay

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "lozo_step.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lozo_step", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tokens_of(logits_model: Any) -> Tensor:
    return torch.arange(24).view(2, 12) % logits_model.config.vocab_size


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_7_a_model_that_has_learnt_nothing_is_its_base_to_the_last_bit(
    tiny_llama: Path, tmp_path: Path, storage: str
) -> None:
    raw = job(tiny_llama, tmp_path, update={"kind": "bank", "rank": 2, "blocks": 2}, gradient={"kind": "lozo"})
    raw["model"] |= {"storage": storage}
    recipe = parse_recipe(raw)
    model = build_run(recipe).loaded.model
    raw["select"] = {"kind": "patterns", "targets": ["q_proj"]}
    other = build_run(parse_recipe(raw)).loaded.model
    with torch.inference_mode():
        assert torch.equal(model(tokens_of(model)).logits, other(tokens_of(other)).logits)


def test_7_the_base_keeps_its_bytes_over_many_steps(tiny_llama: Path, tmp_path: Path) -> None:
    run = prepared(tiny_llama, tmp_path, model={"storage": "nf4"})
    before = base_digest(run.engine.module)
    values = {name: param.detach().clone() for name, param in run.params.items()}
    [batch] = first_batches(run)
    for step in range(100):
        closure = BatchClosure(
            objective=run.objective, engine=run.engine, batch=batch, noise_seed=step, run_seed=step, is_last=True
        )
        run.engine.backward(run.source(closure, run.params).surrogate)
        run.engine.step()
    assert base_digest(run.engine.module) == before
    assert any(not torch.equal(values[name], param) for name, param in run.params.items())


@pytest.mark.parametrize("kind", ["lozo", "spsa"])
def test_8_in_fp64_the_side_path_is_the_perturbation_of_the_parameters(
    tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    run = prepared(tiny_llama, tmp_path, gradient={"kind": kind, "epsilon": EPS})
    run.engine.module.double()
    [batch] = first_batches(run)
    direction = {name: value.double() for name, value in direction_of(run).items()}
    found = scalar(closure_of(run, batch).pair([direction], EPS))
    assert found == pytest.approx(in_place(run, batch, direction), rel=1e-9)


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
@pytest.mark.parametrize("tokens", [256, 512])
def test_13_a_step_stays_within_its_budget(
    tiny_llama: Path, tmp_path: Path, benchmark: ModuleType, storage: str, tokens: int
) -> None:
    arguments = benchmark.argparse.Namespace(model=str(tiny_llama), out=tmp_path)
    run = build_run(benchmark.recipe(arguments, storage))
    shape = benchmark.shape_of(run.loaded.model.config)
    batch, training = benchmark.synthetic(2, tokens, shape["vocabulary"]), prepare_replay(run)
    two_point(training).epsilon = Epsilon(EPS, 1.0)
    before, step = base_digest(run.loaded.model), benchmark.step_of(training, batch)
    step()
    state = sum(param.nbytes for param in training.params.values())
    assert benchmark.peak_above(step) + state <= benchmark.budget(shape, 2 * tokens, gpu=False)
    assert base_digest(run.loaded.model) == before
