"""One of two processes of ``test_deepspeed.py``: ``deepspeed_ranks.py FOLDER CHECKPOINT``; rank 0 leaves facts.json."""

from __future__ import annotations

import copy
import gc
import json
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_ranks import SAVED, Case, chosen_cases, prepared, recipe, train
from tiny_run import TinyBatches, TinyCausalLM, tiny_recipe

from qaft.build import build_run
from qaft.recipe import Recipe
from qaft.train.deepspeed import DeepSpeedEngine
from qaft.train.groups import param_groups
from qaft.train.loss import CausalLoss
from qaft.train.objective import Objective
from qaft.train.optimizers import make_optimizer
from qaft.training import prepare_training
from qaft.zero import engine_config, zero_config

PARTITIONED = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
HALVES, HALF_ENGINES = ("bfloat16", "float16"), ("zero2", "zero3")
SAVING = ("zero2", "zero3", "zero3_offload")
RESUMED = Case("lowrank", "int4 qat")
DENSE = Case("dense", "int4")
SMALL_BUCKET = 1024
ODD_WIDTH = 15
"""A width at which no parameter can be cut into two equal parts."""


def half_precision_cases() -> list[Case]:
    """A frozen model in 16 bits under trained parameters in fp32, with the loss scale that fp16 needs."""
    return [replace(RESUMED, engine=engine, dtype=dtype) for dtype in HALVES for engine in ("ddp", *HALF_ENGINES)]


class OddRun:
    """An engine over parameters of odd sizes in two groups, and the steps it is asked for."""

    def __init__(self, engine: str, optim: dict[str, Any]) -> None:
        tiny: Recipe = tiny_recipe({"lr_scale": {"v_proj": 2}, **optim}, batch_size=4, deepspeed=engine)
        module = CausalLoss(TinyCausalLM(hidden=ODD_WIDTH))
        self.params = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
        groups = param_groups(self.params.items(), tiny.optim)
        config = engine_config(tiny, world_size=2, num_trainable=sum(p.numel() for p in self.params.values()))
        device = torch.device("cpu")
        self.engine = DeepSpeedEngine(module, make_optimizer(groups, tiny.optim, device), config, device=device)
        self.batches = list(TinyBatches(steps=3, rank=self.engine.rank, world=2).from_step(0))

    def step(self, index: int) -> Any:
        self.engine.backward(Objective()(self.engine, self.batches[index], seed=0))
        return self.engine.step()

    def whole(self) -> dict[str, torch.Tensor]:
        return shared(self.engine.whole_parameters(self.params))


def shared(value: Any) -> Any:
    """A copy of rank 0's value, on every rank."""
    box = [copy.deepcopy(value)]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def continues_bit_for_bit(engine: str, optim: dict[str, Any]) -> bool:
    """Whether a new engine with the gathered state takes the step that the old one takes."""
    old = OddRun(engine, optim)
    for index in range(2):
        old.step(index)
    params, state = old.whole(), shared(old.engine.optimizer_state())
    new = OddRun(engine, optim)
    new.engine.load_parameters(new.params, params)
    new.engine.load_optimizer_state(state)
    old.step(2)
    new.step(2)
    expected, found = old.whole(), new.whole()
    return all(torch.equal(expected[name], found[name]) for name in expected)


def refuses_a_gradient_of_one_rank(engine: str) -> dict[str, Any]:
    """What a step does whose gradient is not finite on rank 1 alone, and the step after it."""
    run = OddRun(engine, {})
    poisoned = [run.engine.rank == 1]
    next(iter(run.params.values())).register_hook(lambda g: g * float("nan") if poisoned[0] else g)
    before = run.whole()
    info = run.step(0)
    kept = all(torch.equal(before[name], value) for name, value in run.whole().items())
    poisoned[0] = False
    after = run.step(1)
    return {
        "stepped": info.stepped,
        "norm": info.grad_norm,
        "kept": kept,
        "then": after.stepped,
        "after": after.grad_norm,
    }


def partition_facts(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """What lies on this rank between the steps of ZeRO 3."""
    run = prepared(replace(RESUMED, engine="zero3", purpose="inspect"), checkpoint, folder)
    sizes = [param.numel() for param in run.params.values()]
    whole = run.engine.whole_parameters(run.params)
    facts = {"local": sizes, "whole": [list(value.shape) for value in whole.values()]}
    run.engine.release()
    return facts | {"released": [list(p.shape) for p in run.engine.module.parameters() if p.requires_grad]}


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Let the collector see only what is made inside: it takes a second to go through all that libraries have made."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live_bytes(params: Iterable[torch.Tensor]) -> int:
    """Bytes of all tensors that the collector sees, and of the gradients of ``params``, which it does not."""
    gc.collect()
    found = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    found += [param.grad for param in params if param.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.device.type != "meta"}
    return sum(storages.values())


def settled_bytes(extra: Iterable[torch.Tensor]) -> int:
    """Bytes of live tensors once gloo's threads have let go of what they have reduced, a moment after the call."""
    tensors, found = list(extra), []
    for _ in range(10):
        found.append(live_bytes(tensors))
        time.sleep(0.02)
    return min(found)


@only_new_objects()
def held_bytes(engine: str, checkpoint: Path, folder: Path) -> int:
    """Most bytes that an engine adds to a built model between the micro-batches of its second step."""
    config = zero_config(engine)
    if "reduce_bucket_size" in config["zero_optimization"]:
        config["zero_optimization"]["reduce_bucket_size"] = SMALL_BUCKET
    path = folder / f"{engine}-{dist.get_rank()}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    run = build_run(
        recipe(replace(DENSE, purpose=f"plan {engine}"), checkpoint, folder, deepspeed=str(path)), share=True
    )
    model = run.loaded.model
    built = settled_bytes([]) - sum(p.nbytes for p in model.parameters() if p.requires_grad)
    training = prepare_training(run)
    peak = 0
    for index, batch in enumerate(training.batches.from_step(0)):
        value = training.objective(training.engine, batch, seed=0)
        training.engine.backward(value)
        del value
        if index >= 2:
            peak = max(peak, settled_bytes(training.params.values()) - built)
        if training.engine.due:
            training.engine.step()
        if index == 3:
            break
    training.engine.release()
    return peak


def main(folder: Path, checkpoint: Path) -> None:
    for case in chosen_cases():
        train(case, checkpoint, folder)
    for engine in SAVING:
        train(replace(RESUMED, engine=engine, purpose="save"), checkpoint, folder, save_every=SAVED)
        train(replace(RESUMED, engine=engine, purpose="resume"), checkpoint, folder, save_every=SAVED, resume=True)
    for case in half_precision_cases():
        train(case, checkpoint, folder)
    held_bytes("zero0", checkpoint, folder)  # what libraries and data keep from now on
    facts = {
        "held": {engine: held_bytes(engine, checkpoint, folder) for engine in ("zero0", *PARTITIONED)},
        "partition": partition_facts(checkpoint, folder),
        "continues": {
            f"{e} {o['name']}": continues_bit_for_bit(e, o) for e in ("zero0", *PARTITIONED) for o in OPTIMIZERS
        },
        "refuses": {engine: refuses_a_gradient_of_one_rank(engine) for engine in ("zero0", *PARTITIONED)},
    }
    if dist.get_rank() == 0:
        (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    dist.barrier()


OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {"name": "adamw", "weight_decay": 0.1},
    {"name": "sgd", "momentum": 0.9},
)

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
