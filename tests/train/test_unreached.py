"""Trained layers that a forward pass does not reach: their gradient is zero, with any number of processes.

Run as a script it is one of two processes that train together.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_job import job
from tiny_run import TinyBatches, TinyCausalLM, TinyDecoder, make_run, values
from torch import Tensor, nn
from two_ranks import run_ranks

from qaft.build import Run, build_run
from qaft.recipe import parse_recipe
from qaft.train.checkpoint import latest_checkpoint, read_checkpoint
from qaft.train.loop import fit
from qaft.train.objective import Objective
from qaft.train.resume import start_state
from qaft.training import prepare_training
from qaft.updates import UPDATES

KINDS: dict[str, dict[str, Any]] = {
    "bank": {"update": {"kind": "bank", "rank": 2, "blocks": 2}},
    "dense": {"update": {"kind": "dense"}},
    "lowrank": {"update": {"kind": "lowrank", "rank": 4}},
    "roco": {"update": {"kind": "roco", "rows": 2, "columns": 3}},
    "gsoft": {"update": {"kind": "gsoft", "block": 8}},
    "ia3": {"update": {"kind": "ia3"}},
    "linchain": {"update": {"kind": "linchain", "rank": 4}},
    "sift": {"update": {"kind": "sift", "rate": 0.05}},
    "ssb": {"update": {"kind": "ssb"}},
    "ssl": {"update": {"kind": "ssl"}},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "qat": {"qat": {"weights": {"bits": 4, "group_size": 32}}},
    "checkpointing": {"train": {"gradient_checkpointing": True}},
}
NUM_EXPERTS = 3
ROUTED: dict[str, Any] = {"steps": 3, "rows": 8, "grad_accumulation": 2, "optim": {"lr": 0.01, "weight_decay": 0.1}}


class RoutedDecoder(TinyDecoder):
    """Each row goes through one of two experts, told by its first token; the third expert is never used."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 0.0)
        self.experts = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(NUM_EXPERTS)])

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        x = super().forward(input_ids).last_hidden_state
        routed = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (input_ids[:, 0] % 2 == index).nonzero().flatten()
            if len(rows):
                routed = routed.index_add(0, rows, expert(x[rows]))
        return SimpleNamespace(last_hidden_state=x + routed)


class RoutedBatches(TinyBatches):
    """In steps of even number every row has the same expert; otherwise every micro-batch of a rank has its own."""

    def rows_of(self, step: int) -> tuple[Tensor, Tensor]:
        tokens, labels = super().rows_of(step)
        if step % 2:
            tokens[:, 0] = torch.arange(self.rows) // 2 % 2
        else:
            tokens[:, 0] = step // 2
        return tokens, labels


def routed_model() -> TinyCausalLM:
    model = TinyCausalLM()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model.model = RoutedDecoder(16)
    return model


def train_routed(folder: Path, rank: int = 0, world: int = 1) -> Any:
    batches = RoutedBatches(steps=ROUTED["steps"], rows=ROUTED["rows"], accumulation=2, rank=rank, world=world)
    run = make_run(folder, model=routed_model(), batches=batches, **ROUTED)
    layers = {name: m for name, m in run.engine.module.named_modules() if isinstance(m, nn.Linear)}
    run = replace(run, objective=Objective(layers=layers))
    fit(run, start_state(run))
    return run


def train_tiny(checkpoint: Path, folder: Path, kind: str, variant: str) -> Run:
    given: Mapping[str, Any] = {**KINDS[kind], **VARIANTS[variant]}
    folder.mkdir(parents=True, exist_ok=True)
    raw = job(checkpoint, folder, data={"valid": None}, **given)
    raw["train"] |= {"steps": 3, "grad_accumulation": 2, "batch_size": 2}
    raw["optim"] |= {"lr": 1e-3}
    run = build_run(parse_recipe(raw), device=torch.device("cpu"))
    training = prepare_training(run)
    fit(training, start_state(training))
    return run


CASES = [(kind, variant) for kind in KINDS for variant in VARIANTS]


def main(folder: Path, checkpoint: Path) -> None:
    torch.set_num_threads(1)
    train_routed(folder / "routed", int(os.environ["RANK"]), 2)
    for kind, variant in CASES:
        train_tiny(checkpoint, folder / f"{kind}-{variant}", kind, variant)


@pytest.fixture(scope="module")
def together(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what two processes trained together."""
    folder = tmp_path_factory.mktemp("together")
    for kind, variant in CASES:
        (folder / f"{kind}-{variant}").mkdir()
        job(tiny_llama, folder / f"{kind}-{variant}")  # one process writes the rows
    run_ranks(Path(__file__), str(folder), str(tiny_llama))
    return folder


def trained(folder: Path) -> Mapping[str, Tensor]:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    return read_checkpoint(checkpoint).trainables


def test_every_update_has_a_case() -> None:
    assert KINDS.keys() == UPDATES.keys()


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_two_processes_train_every_update_as_one_does(
    together: Path, tiny_llama: Path, tmp_path: Path, kind: str, variant: str
) -> None:
    run = train_tiny(tiny_llama, tmp_path, kind, variant)
    alone, ours = trained(run.folder), trained(together / f"{kind}-{variant}" / "run")
    assert alone.keys() == ours.keys()
    for name in alone:
        torch.testing.assert_close(ours[name], alone[name], rtol=0, atol=2e-5)


def test_two_processes_that_reach_different_experts_train_as_one_does(together: Path, tmp_path: Path) -> None:
    start = dict(routed_model().named_parameters())
    alone, ours = values(train_routed(tmp_path)), trained(together / "routed")
    assert alone.keys() == ours.keys()
    for name in alone:
        torch.testing.assert_close(ours[name], alone[name], rtol=0, atol=1e-6)
    for index in range(NUM_EXPERTS - 1):
        name = f"model.experts.{index}.weight"
        assert float((ours[name] - start[name].detach()).abs().max()) > 0.5 * ROUTED["optim"]["lr"]
    norms = [json.loads(line)["grad_norm"] for line in (together / "routed" / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line)["grad_norm"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert norms == pytest.approx(expected, rel=1e-5)


def test_a_layer_that_is_never_reached_has_a_zero_gradient_and_the_value_is_unchanged(tmp_path: Path) -> None:
    run = make_run(tmp_path, model=routed_model(), **ROUTED)
    layers = {name: m for name, m in run.engine.module.named_modules() if isinstance(m, nn.Linear)}
    (batch, *_) = RoutedBatches(steps=1, rows=8).from_step(0)
    objective = Objective(layers=layers)
    value = objective(run.engine, batch, seed=0)
    assert torch.equal(value, run.engine.module(batch.input_ids, batch.labels) / batch.num_targets)
    value.backward()
    gradients = {name: param.grad for name, param in run.params.items()}
    for index, is_reached in enumerate((True, False, False)):
        gradient = gradients[f"model.experts.{index}.weight"]
        assert gradient is not None
        assert bool(gradient.any()) is is_reached
    assert not any(module._forward_pre_hooks for module in layers.values())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
