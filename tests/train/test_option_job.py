"""Training on choices between options through a recipe: back-propagation and losses alone, against the slow loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.options import choice_losses
from test_zeroth_order import BANK, EPS, SGD, closure_of, direction_of, scalar
from tiny_job import COLORS, job, train, write_rows
from torch import Tensor

from qaft.build import build_run, restore_run
from qaft.data import classification_items
from qaft.errors import IncompatibleError
from qaft.gradients.base import Direction
from qaft.recipe import parse_recipe
from qaft.train.run import TrainRun
from qaft.training import prepare_training

# The tokenizer knows bytes: several tokens with a common beginning, some with, and one token each.
VERBALIZERS = {
    "several tokens": {"0": " red", "1": " reddish", "2": " blue"},
    "one token": {"0": "r", "1": "b", "2": "g"},
}

LOSSES_ALONE: dict[str, dict[str, Any]] = {
    "lozo": {"update": BANK},
    "lozo_m": {"update": BANK},
    "mezo": {"update": {"kind": "dense"}},
    "spsa": {"update": {"kind": "roco", "rows": 3}},
}


def raw(checkpoint: Path, folder: Path, verbalizers: str = "several tokens", **sections: Any) -> dict[str, Any]:
    rows = [{"i": "x" * i, "label": i % 3} for i in range(len(COLORS))]
    file = str(write_rows(folder / "classes.jsonl", rows))
    classes = {"prompt": "Box {i} is", "verbalizers": VERBALIZERS[verbalizers], "loss": "options"}
    data = {"train": file, "valid": file, "classification": classes}
    return job(checkpoint, folder, data=data, **sections)


def prepared(checkpoint: Path, folder: Path, verbalizers: str = "several tokens", **sections: Any) -> TrainRun:
    folder.mkdir(exist_ok=True)
    run = prepare_training(build_run(parse_recipe(raw(checkpoint, folder, verbalizers, **sections))))
    generator = torch.Generator().manual_seed(0)
    for param in run.params.values():
        param.data += 0.01 * torch.randn(param.shape, generator=generator, dtype=torch.float32)
    return run


def items_of(checkpoint: Path, folder: Path, verbalizers: str = "several tokens") -> list[Any]:
    loaded = build_run(parse_recipe(raw(checkpoint, folder, verbalizers))).loaded
    return classification_items(parse_recipe(raw(checkpoint, folder, verbalizers)).data, loaded.tokenizer)


def slow_loss(run: TrainRun, items: list[Any]) -> Tensor:
    """The mean over all rows."""
    return choice_losses(run.engine.module.loss.model.eval(), items).mean()


def moved(run: TrainRun, items: list[Any], direction: Direction) -> float:
    """The projected gradient of the slow loss, from parameters that are moved in place and put back."""
    values, losses = {name: run.params[name].detach().clone() for name in direction}, []
    for sign in (1, -1):
        with torch.no_grad():
            for name, value in values.items():
                run.params[name].copy_(value + sign * EPS * direction[name])
            losses.append(float(slow_loss(run, items)))
    for name, value in values.items():
        run.params[name].data.copy_(value)
    return (losses[0] - losses[1]) / (2 * EPS)


@pytest.mark.parametrize("verbalizers", VERBALIZERS)
@pytest.mark.parametrize("kind", LOSSES_ALONE)
def test_the_projected_gradient_is_that_of_every_option_alone(
    tiny_llama: Path, tmp_path: Path, kind: str, verbalizers: str
) -> None:
    sections = {"gradient": {"kind": kind, "epsilon": EPS}, "optim": SGD, **LOSSES_ALONE[kind]}
    run = prepared(tiny_llama, tmp_path, verbalizers, **sections)
    run.engine.module.double()
    [batch] = [next(iter(run.batches.from_step(0)))]
    direction = {name: value.double() for name, value in direction_of(run).items()}
    pair = closure_of(run, batch).pair([direction], EPS)
    assert pair.targets.tolist() == [1] * len(COLORS)
    expected = moved(run, items_of(tiny_llama, tmp_path, verbalizers), direction)
    # The model's norms compute in fp32: losses are known to 1e-7, their difference over 2 epsilon to 1e-4.
    assert scalar(pair) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("verbalizers", VERBALIZERS)
def test_the_gradient_is_that_of_every_option_alone_however_the_rows_are_divided(
    tiny_llama: Path, tmp_path: Path, verbalizers: str
) -> None:
    found = []
    for rows in (8, 2):
        sections = {"train": {"batch_size": rows, "grad_accumulation": 8 // rows}}
        run = prepared(tiny_llama, tmp_path / str(rows), verbalizers, **sections)
        batches = iter(run.batches.from_step(0))
        for _ in range(8 // rows):
            closure_of(run, next(batches))().backward()
        found.append([param.grad for param in run.params.values()])
    (tmp_path / "slow").mkdir()
    items = items_of(tiny_llama, tmp_path / "slow", verbalizers)
    found.append(torch.autograd.grad(slow_loss(run, items), list(run.params.values())))
    for whole, divided, slow in zip(*found, strict=True):
        torch.testing.assert_close(whole, slow, rtol=1e-3, atol=2e-5 * float(slow.abs().max()))
        torch.testing.assert_close(divided, slow, rtol=1e-3, atol=2e-5 * float(slow.abs().max()))


def test_scalars_of_micro_batches_add_up_to_that_of_the_whole(tiny_llama: Path, tmp_path: Path) -> None:
    scalars = []
    for rows in (8, 2):
        sections = {"train": {"batch_size": rows, "grad_accumulation": 8 // rows}, "update": BANK, "optim": SGD}
        run = prepared(tiny_llama, tmp_path / str(rows), gradient={"kind": "lozo", "epsilon": EPS}, **sections)
        run.engine.module.double()
        batches = iter(run.batches.from_step(0))
        for index in range(8 // rows):
            closure = closure_of(run, next(batches), is_last=index == 8 // rows - 1)
            estimate = run.source(closure, run.params)
        scalars.append(estimate.scalars[0])
    assert scalars[0] == pytest.approx(scalars[1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["backprop", "lozo"])
def test_a_recipe_trains_on_the_loss_that_it_logs_and_evaluates(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    sections = {"update": BANK, "optim": SGD, "gradient": {"kind": "lozo"}} if kind == "lozo" else {}
    recipe = raw(tiny_llama, tmp_path, train={"steps": 3, "eval_every": 3}, **sections)
    items = items_of(tiny_llama, tmp_path)
    before = choice_losses(build_run(parse_recipe(recipe)).loaded.model.eval(), items).mean().item()
    train(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [first, *_] = [line["loss"] for line in lines if "loss" in line]
    [last] = [line["eval_loss"] for line in lines if "eval_loss" in line]
    # The loss of a choice has none.
    assert not any("eval_perplexity" in line for line in lines)
    after = choice_losses(restore_run(tmp_path / "run").loaded.model.eval(), items).mean().item()
    assert first == pytest.approx(before, rel=1e-4)
    assert last == pytest.approx(after, rel=1e-4)
    assert after != before


def test_attention_that_cannot_keep_options_apart_is_refused_where_they_need_it(
    tiny_llama: Path, tmp_path: Path
) -> None:
    for verbalizers in VERBALIZERS:
        run = build_run(parse_recipe(raw(tiny_llama, tmp_path, verbalizers)))
        run.loaded.model.config.sliding_window = 16
        if verbalizers == "one token":
            prepare_training(run)
        else:
            with pytest.raises(IncompatibleError, match="sliding_window"):
                prepare_training(run)
