"""The same runs through every engine: two processes that train all cases in one group, and one that trains alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tiny_job import job
from torch import Tensor

from qaft.build import build_run
from qaft.layers.attach import trainable_parameters
from qaft.recipe import Recipe, parse_recipe
from qaft.train.loop import fit
from qaft.train.resume import start_state
from qaft.train.run import TrainRun
from qaft.training import prepare_training
from qaft.updates import UPDATES

STEPS, SAVED = 4, 2
"""Length of the runs, and the step after which those that are continued are saved."""

LR_RATIO = 2.0
CLIP = 0.5
"""Below the norms of the low-rank update, so that clipping acts there."""

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
_OPTIONS: dict[str, dict[str, Any]] = {
    "gsoft": {"block": 8},
    "linchain": {"rank": 4, "depth": 2},
    "lowrank": {"rank": 4},
    "roco": {"rows": 2, "columns": 3},
    "sift": {"rate": 0.05, "choose": "random"},
}
"""Sizes that fit tiny layers; every registered update is a kind, with its defaults where none are given."""

KINDS: dict[str, dict[str, Any]] = {kind: {"kind": kind, **_OPTIONS.get(kind, {})} for kind in UPDATES}
BASES: dict[str, dict[str, Any]] = {
    "nf4": {"model": {"storage": "nf4"}},
    "int4": {"model": {"storage": "int4", "group_size": 32}},
    "int4 qat": {"model": {"storage": "int4"}, "qat": {"weights": {"group_size": 32}, "rotation": "hadamard"}},
}


@dataclass(frozen=True)
class Case:
    """What is trained, by which engine (None: one process without DeepSpeed), and why once more."""

    kind: str
    base: str
    engine: str | None = None
    purpose: str = "agree"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.kind} {self.base} {self.engine} {self.purpose} {self.dtype}".replace(" ", "-")


def chosen_cases() -> list[Case]:
    """Every engine, every base with a few of them (it is frozen: engines see the update), every update with ZeRO 3."""
    bases = list(BASES)
    engines = {(kind, bases[index % len(bases)]): ("zero3",) for index, kind in enumerate(KINDS)}
    engines |= {("lowrank", "nf4"): ("ddp", "zero3"), ("lowrank", "int4"): ("zero2", "zero3_offload")}
    engines |= {("lowrank", "int4 qat"): ENGINES}
    return [Case(kind, base, engine) for (kind, base), names in engines.items() for engine in names]


@dataclass(frozen=True)
class Outcome:
    """Loss, gradient norm and learning rates of every step, and the parameters after the last one."""

    steps: list[dict[str, float]]
    parameters: dict[str, Tensor]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.steps]


def recipe(case: Case, checkpoint: Path, folder: Path, **train: Any) -> Recipe:
    """A run of two micro-batches a step, with two groups, a schedule, decay, and clipping that acts."""
    sections = {key: dict(value) for key, value in BASES[case.base].items()}
    engine = {} if case.engine in (None, "ddp") else {"deepspeed": case.engine}
    output = str(folder / case.name)
    raw = job(
        checkpoint,
        folder,
        update=KINDS[case.kind],
        # A large eps: Adam turns the rounding of a gradient that is zero into a whole step.
        optim={"lr_scale": {"v_proj": LR_RATIO}, "schedule": "cosine", "warmup": 1, "weight_decay": 0.1, "eps": 1e-4},
        train={"steps": STEPS, "grad_accumulation": 2, "output": output, **engine, **train},
        select={"kind": "patterns", "targets": ["q_proj", "v_proj"]},
        **sections,
    )
    raw["optim"]["clip"] = CLIP
    raw["model"]["dtype"] = case.dtype
    raw["data"]["valid"] = None
    return parse_recipe(raw)


def prepared(case: Case, checkpoint: Path, folder: Path, **train: Any) -> TrainRun:
    """The run that ``qaft train`` would make."""
    return prepare_training(build_run(recipe(case, checkpoint, folder, **train), share=True), console=None)


def train(case: Case, checkpoint: Path, folder: Path, **train_options: Any) -> None:
    """Train a case, release its engine, and write the final parameters beside the run folder's other files."""
    run = prepared(case, checkpoint, folder, **train_options)
    fit(run, start_state(run))
    run.engine.release()
    if run.engine.rank == 0:
        params = {name: param.detach().clone() for name, param in trainable_parameters(run.engine.module).items()}
        save_file(params, run.folder / "final.safetensors")


def outcome(case: Case, folder: Path) -> Outcome:
    """What ``train`` has left."""
    run = folder / case.name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Outcome([row for row in rows if "loss" in row], load_file(run / "final.safetensors"))


def difference(left: Outcome, right: Outcome) -> tuple[float, float]:
    """Largest difference of losses and of parameters."""
    losses = max(abs(a - b) for a, b in zip(left.losses(), right.losses(), strict=True))
    assert left.parameters.keys() == right.parameters.keys()
    parameters = max(float((left.parameters[n] - right.parameters[n]).abs().max()) for n in left.parameters)
    return losses, parameters


def resumable(case: Case, source: Case, folder: Path) -> None:
    """Give ``case`` the run folder of ``source`` as it was after its first checkpoint."""
    shutil.copytree(folder / source.name, folder / case.name)
    shutil.rmtree(folder / case.name / f"checkpoint-{STEPS}")
    metrics = folder / case.name / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= SAVED), encoding="utf-8")
