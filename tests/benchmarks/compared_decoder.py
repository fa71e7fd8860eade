"""A causal LM on one task: trained through a recipe, then scored by verbalizers or by the loss on the answers."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compared_variants import Variant
from torch import Tensor, nn

from qaft.build import Run, build_run
from qaft.data import classification_items, load_samples
from qaft.errors import TrainingError
from qaft.evaluate.classification import verbalizer_accuracy
from qaft.evaluate.perplexity import samples_perplexity
from qaft.models.skeleton import block_linears, empty_model
from qaft.models.source import config_of
from qaft.recipe import Recipe, parse_recipe
from qaft.train.loop import fit
from qaft.train.resume import start_state
from qaft.train.run import TrainRun
from qaft.training import prepare_training


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set and how it is scored: accuracy in percent of the verbalizers, or the loss in nats per answer token."""

    data: Mapping[str, Any]
    batch_size: int
    rows: int
    longest: Mapping[str, int] = field(default_factory=dict)

    @property
    def classifies(self) -> bool:
        """Whether the score is an accuracy."""
        return "classification" in self.data


def _verbalized(prompt: str, options: Mapping[str, str], max_length: int) -> dict[str, Any]:
    classification = {"prompt": prompt, "verbalizers": dict(options)}
    return {"format": "classification", "classification": classification, "max_length": max_length}


TASKS = {
    "mr": Task(
        data=_verbalized("{sentence} It was", {"0": " terrible", "1": " great"}, 128),
        batch_size=8,
        rows=250,
        longest={"sentence": 100},
    ),
    "boolq": Task(
        data=_verbalized("{passage}\nQuestion: {question}?\nAnswer:", {"0": " no", "1": " yes"}, 192),
        batch_size=4,
        rows=94,
        longest={"passage": 300},
    ),
    "gsm8k": Task(
        data={
            "format": "prompt_completion",
            "columns": {"prompt": "question", "completion": "answer"},
            "chat_template": "plain",
            "max_length": 256,
        },
        batch_size=2,
        rows=40,
        longest={"question": 250, "answer": 300},
    ),
}


class Decoder:
    """Trains and scores variants of one causal LM; all linear layers of its blocks are adapted.

    Args:
        model: folder or hub id.
        data: folder with a folder for each task, of ``train.jsonl`` and ``valid.jsonl``.
        steps: of every cell.
    """

    name = "decoder"
    tasks = tuple(TASKS)
    ties = True

    def __init__(self, model: str, data: Path, steps: int) -> None:
        self.model, self.data, self.steps = model, data, steps

    def size(self) -> dict[str, int]:
        """Return what budgets are counted from; see ``variants``."""
        section = parse_recipe({"model": {"name": self.model}}).model
        linears = block_linears(empty_model(config_of(section), dtype=torch.bfloat16)).values()
        return {
            "weights": sum(linear.weight.numel() for linear in linears),
            "inputs": sum(linear.in_features for linear in linears),
            "outputs": sum(linear.out_features for linear in linears),
        }

    def untrained(self, task: str) -> float:
        """Return the score of the model as it is."""
        with tempfile.TemporaryDirectory() as folder:
            nothing = Variant(name="", kind="ia3", budgets=(), lr=1.0)
            return score(build_run(self._recipe(task, nothing, 1.0, 0, Path(folder))), TASKS[task])

    def cell(self, task: str, variant: Variant, lr: float, seed: int) -> dict[str, Any]:
        """Return what one training gives: score, trainables, bytes kept for backward per token, tokens per second."""
        with tempfile.TemporaryDirectory() as folder:
            run = build_run(self._recipe(task, variant, lr, seed, Path(folder)))
            training = prepare_training(run)
            kept = kept_bytes_per_token(training)
            fit(training, start_state(training))
            speeds = [record["tokens_per_second"] for record in steps_of(run.folder)]
            return {
                "score": score(run, TASKS[task]),
                "trainables": sum(parameter.numel() for parameter in training.params.values()),
                "kept_bytes_per_token": kept,
                "tokens_per_second": statistics.median(speeds),
            }

    def trial(self, variant: Variant, lr: float, *, steps: int) -> float:
        """Return the mean loss of the last third of a short training on MR.

        A run that diverges has an infinite loss.
        """
        with tempfile.TemporaryDirectory() as folder:
            recipe = self._recipe("mr", variant, lr, 1000, Path(folder), steps=steps)
            training = prepare_training(build_run(recipe))
            try:
                fit(training, start_state(training))
            except TrainingError:
                return math.inf
            losses = [record["loss"] for record in steps_of(training.folder)]
        return statistics.mean(losses[-(len(losses) // 3) :])

    def _recipe(self, task: str, variant: Variant, lr: float, seed: int, folder: Path, *, steps: int = 0) -> Recipe:
        settings = TASKS[task]
        files = {part: str(self._rows(task, part, folder)) for part in ("train", "valid")}
        steps = steps or self.steps
        return parse_recipe(
            {
                "model": {"name": self.model, "storage": "bf16"},
                "select": {"kind": "patterns", "targets": ["all"]},
                "update": {"kind": variant.kind, **variant.options},
                "optim": {"lr": lr, "schedule": "linear", "warmup": 0.1},
                "data": {"packing": False, **settings.data, **files},
                "train": {
                    "steps": steps,
                    "batch_size": settings.batch_size,
                    "seed": seed,
                    "eval_batches": 1,
                    "output": str(folder / "run"),
                },
            }
        )

    def _rows(self, task: str, part: str, folder: Path) -> Path:
        """Write the rows that are not too long, and of those that score the first ones."""
        settings, path = TASKS[task], folder / f"{part}.jsonl"
        # Not splitlines: a text may hold other ends of lines than those of the file.
        lines = (self.data / task / path.name).read_text(encoding="utf-8").rstrip("\n").split("\n")
        short = [
            line for line in lines if all(len(json.loads(line)[name]) <= n for name, n in settings.longest.items())
        ]
        path.write_text("\n".join(short[: settings.rows if part == "valid" else None]) + "\n", encoding="utf-8")
        return path


def score(run: Run, task: Task) -> float:
    """Return the accuracy in percent, or the loss per target token, on the validation rows."""
    model, tokenizer, section = run.loaded.model, run.loaded.tokenizer, run.recipe.data
    if task.classifies:
        return 100 * verbalizer_accuracy(model, classification_items(section, tokenizer)).value
    samples = load_samples(section, tokenizer, "valid").samples
    found = samples_perplexity(model, samples, max_length=section.max_length)
    return found.nll / found.tokens


def steps_of(folder: Path) -> list[dict[str, float]]:
    """Return what the log says of each step."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "tokens_per_second" in record]


def kept_bytes_per_token(training: TrainRun) -> float:
    """Return what autograd keeps of a forward pass over the first batch, without what is there anyway, per token."""
    batch = next(iter(training.batches.from_step(0)))
    inputs = {k: v for k, v in batch.loss_inputs().items() if v is not None}
    return kept_bytes(training.engine.module, lambda: training.engine.module(**inputs)) / batch.input_ids.numel()


def kept_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that ``forward`` keeps for its backward pass besides parameters and buffers."""
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    # Held, so that no address is given out twice.
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> None:
        # Nothing for the graph to hold: an output that it holds holds the graph, and both would live for ever.
        if (key := tensor.untyped_storage().data_ptr()) not in known:
            kept.setdefault(key, tensor.detach())

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        value = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del value
    return total
