"""A complete training run of a few hundred parameters, for tests and for the processes that tests kill."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

import qaft
from qaft.data.batches import Batch
from qaft.gradients.backprop import Backprop
from qaft.gradients.base import GradientEstimate
from qaft.recipe import Recipe
from qaft.train.engine import AccelerateEngine
from qaft.train.groups import param_groups
from qaft.train.log import RunLog
from qaft.train.loop import fit
from qaft.train.loss import CausalLoss
from qaft.train.objective import Objective
from qaft.train.optimizers import make_optimizer
from qaft.train.resume import start_state
from qaft.train.run import TrainRun
from qaft.train.schedules import make_scheduler

VOCABULARY = 64
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(qaft.__file__).parents[1])}
"""For processes that import this package from the checkout, wherever the tests were started."""


class TinyDecoder(nn.Module):
    """Frozen embedding, two trained linear layers with dropout between them."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden).requires_grad_(False)
        self.q_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        x = self.embed(input_ids)
        return SimpleNamespace(last_hidden_state=x + self.v_proj(self.dropout(torch.tanh(self.q_proj(x)))))


class TinyCausalLM(nn.Module):
    """What ``CausalLoss`` reads of a transformers model, without importing transformers."""

    def __init__(self, *, hidden: int = 16, dropout: float = 0.0, seed: int = 0, softcap: float | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = TinyDecoder(hidden, dropout)
            self.lm_head = nn.Linear(hidden, VOCABULARY, bias=False).requires_grad_(False)
        text = SimpleNamespace(vocab_size=VOCABULARY)
        if softcap is not None:
            text.final_logit_softcapping = softcap
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed


class TinyBatches:
    """Random tokens as a function of (seed, step): ``rows`` rows per step, cut into micro-batches over ranks."""

    def __init__(
        self, *, steps: int, rows: int = 4, accumulation: int = 1, length: int = 6, rank: int = 0, world: int = 1
    ) -> None:
        self.steps, self.rows, self.accumulation, self.length = steps, rows, accumulation, length
        self.rank, self.world = rank, world

    def rows_of(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(0, VOCABULARY, (self.rows, self.length), generator=generator)
        labels = tokens.clone()
        for row in range(self.rows):
            labels[row, : row % 3] = -100  # unequal numbers of targets, where a mean of means would differ
        return tokens, labels

    def from_step(self, step: int) -> Iterator[Batch]:
        for index in range(step, self.steps):
            tokens, labels = self.rows_of(index)
            targets = int((labels[:, 1:] != -100).sum())
            parts = list(
                zip(
                    tokens.chunk(self.accumulation * self.world),
                    labels.chunk(self.accumulation * self.world),
                    strict=True,
                )
            )
            for ids, target in parts[self.rank :: self.world]:
                positions = torch.arange(self.length).expand_as(ids)
                yield Batch(ids, target, positions, None, targets, ids.numel(), index)


class SignalBatches(TinyBatches):
    """Sends this process a signal before the micro-batch number ``at``, counted from 1."""

    def __init__(self, *, at: int, number: int = signal.SIGTERM, **options: Any) -> None:
        super().__init__(**options)
        self.number, self.at = number, at

    def from_step(self, step: int) -> Iterator[Batch]:
        for index, batch in enumerate(super().from_step(step), start=1):
            if index == self.at:
                os.kill(os.getpid(), self.number)
            yield batch


def tiny_recipe(optim: Mapping[str, Any] | None = None, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": {"name": "tiny"}, "optim": {"lr": 0.01, "warmup": 0, **(optim or {})}, "train": train}
    )


def make_run(
    folder: Path,
    *,
    model: Any = None,
    optim: Mapping[str, Any] | None = None,
    source: Any = None,
    regularizers: Sequence[Any] = (),
    batches: Any = None,
    eval_batches: Any = None,
    rows: int = 4,
    engine_options: Mapping[str, Any] | None = None,
    track: Any = None,
    console: Any = None,
    **train: Any,
) -> TrainRun:
    """The composition that ``qaft.training`` makes, on a tiny model."""
    recipe = tiny_recipe(optim, output=str(folder), **train)
    module = CausalLoss(model if model is not None else TinyCausalLM())
    params = {name: param for name, param in module.model.named_parameters() if param.requires_grad}
    optimizer = make_optimizer(param_groups(params.items(), recipe.optim), recipe.optim, torch.device("cpu"))
    accumulation = recipe.train.grad_accumulation
    engine = AccelerateEngine(
        module, optimizer, accumulation=accumulation, clip=recipe.optim.clip, cpu=True, **(engine_options or {})
    )
    if batches is None:
        batches = TinyBatches(
            steps=recipe.train.steps, rows=rows, accumulation=accumulation, rank=engine.rank, world=engine.world_size
        )
    log = RunLog(
        folder,
        total_steps=recipe.train.steps,
        device=engine.device,
        is_main=engine.rank == 0,
        track=track,
        console=console,
    )
    return TrainRun(
        recipe=recipe,
        engine=engine,
        objective=Objective(regularizers, dict(module.model.named_modules())),
        source=source if source is not None else Backprop(),
        params=params,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, recipe.optim, recipe.train.steps),
        batches=batches,
        eval_batches=eval_batches,
        log=log,
        folder=folder,
    )


def values(run: TrainRun) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in run.params.items()}


class TwoPoint:
    """c u with c = (L(theta + eps u) - L(theta - eps u)) / 2 eps for one fixed u, without a backward pass."""

    needs_backward = False
    eps = 1e-2

    def __call__(self, closure: Any, named: Mapping[str, nn.Parameter]) -> GradientEstimate:
        params = tuple(named.values())
        generator = torch.Generator().manual_seed(4)
        directions = [torch.randn(p.shape, generator=generator) for p in params]
        with torch.no_grad():
            originals = [p.clone() for p in params]
            losses = []
            for sign in (1, -1):
                for p, original, u in zip(params, originals, directions, strict=True):
                    p.copy_(original + sign * self.eps * u)
                losses.append(closure())
            for p, original in zip(params, originals, strict=True):
                p.copy_(original)
            c = (losses[0] - losses[1]) / (2 * self.eps)
        surrogate = torch.stack([(p * u).sum() for p, u in zip(params, directions, strict=True)]).sum()
        return GradientEstimate(c * surrogate, (losses[0] + losses[1]) / 2)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def penalty(layers: Mapping[str, nn.Module]) -> Tensor:
    return 0.1 * cast(Tensor, layers["model.q_proj"].weight).square().sum()


RANK_OPTIONS: dict[str, Any] = {
    "steps": 4,
    "rows": 8,
    "optim": {"name": "sgd", "lr": 0.5, "momentum": 0.9, "clip": 0.05},
    "regularizers": (penalty,),
}
"""What every rank of ``run_ranks`` trains, and the single process it is compared with."""


def run_ranks(folder: Path) -> None:
    """One rank's part: train both kinds of source, evaluate, then stop for a signal that only rank 1 receives."""
    batches = list(TinyBatches(steps=3, rank=run_rank(), world=2).from_step(0))
    for name, source in (("backprop", Backprop()), ("two_point", TwoPoint())):
        run = make_run(
            folder / name, source=source, grad_accumulation=2, eval_batches=batches[: 3 - run_rank()], **RANK_OPTIONS
        )
        fit(run, start_state(run))
    run = make_run(folder / "stopped", grad_accumulation=2, **RANK_OPTIONS)
    if run.engine.rank == 1:
        run = replace(run, batches=SignalBatches(at=4, steps=4, rows=8, accumulation=2, rank=1, world=2))
    fit(run, start_state(run))


def run_rank() -> int:
    return int(os.environ["RANK"])


class SlowBatches(TinyBatches):
    """From step ``slow_from`` on leaves the parent process time to send a signal."""

    def __init__(self, *, slow_from: int, **options: Any) -> None:
        super().__init__(**options)
        self.slow_from = slow_from

    def from_step(self, step: int) -> Iterator[Batch]:
        for batch in super().from_step(step):
            time.sleep(0.3 if batch.step >= self.slow_from else 0)
            yield batch


SLOW_STEPS = 40


if __name__ == "__main__":
    if "RANK" in os.environ:
        run_ranks(Path(sys.argv[1]))
    else:
        batches = SlowBatches(steps=SLOW_STEPS, slow_from=int(sys.argv[2]))
        slow = make_run(Path(sys.argv[1]), batches=batches, steps=SLOW_STEPS, save_every=2, resume=True)
        fit(slow, start_state(slow))
