"""A BERT-like encoder on MR: updates on all linear layers of its blocks, a trained linear head on the mean of its states.

The parts are the package's own (frozen layers, updates, entry selection, groups, optimizer); the loop is here, because
the package's objective is that of causal LMs. The head is trained with the same rate by every update and is not counted.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compared_decoder import kept_bytes
from compared_variants import Variant
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from qaft.bases import DenseBase, FrozenLinear, LinearSpec
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.attach import attach, replace_module
from qaft.registry import build_from
from qaft.selection.gradients import largest_gradients
from qaft.updates import UPDATES

BATCH, ROWS, LENGTH, CLASSES = 16, 800, 64, 2
HEAD_RATE = 1e-3

Batch = dict[str, Tensor]


class Classifier(nn.Module):
    """Encoder, mean over tokens, linear head."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
        self.head = nn.Linear(self.encoder.config.hidden_size, CLASSES)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, [B, 2]."""
        mask = batch["attention_mask"].unsqueeze(-1)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        states = self.encoder(**inputs).last_hidden_state * mask
        return self.head(states.sum(1) / mask.sum(1))

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean cross entropy."""
        return F.cross_entropy(self(batch), batch["labels"])


class Encoder:
    """Trains and scores variants of one encoder.

    Args:
        folder: of a checkpoint that transformers loads as an encoder.
        data: folder that holds ``mr``.
        steps: of every cell.
    """

    name = "encoder"
    tasks = ("mr",)
    ties = False

    def __init__(self, folder: str, data: Path, steps: int) -> None:
        transformers_logging.disable_progress_bar()
        self.folder, self.data, self.steps = folder, data, steps
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def size(self) -> dict[str, int]:
        """Return what budgets are counted from; see ``variants``."""
        linears = _linears(Classifier(self.folder)).values()
        return {
            "weights": sum(linear.weight.numel() for linear in linears),
            "inputs": sum(linear.in_features for linear in linears),
            "outputs": sum(linear.out_features for linear in linears),
        }

    def untrained(self, task: str) -> float:
        """Return the accuracy when only the head is trained."""
        torch.manual_seed(0)
        model = Classifier(self.folder)
        model.encoder.requires_grad_(False)
        _train(model, self._batches(0, self.steps), [], 0.0, self.steps)
        return self._accuracy(model)

    def cell(self, task: str, variant: Variant, lr: float, seed: int) -> dict[str, Any]:
        """Return what one training gives: score, trainables, bytes kept for backward per token, tokens per second."""
        model, params = self._adapted(variant, seed)
        batch = next(self._batches(seed, 1))
        kept = kept_bytes(model, lambda: model.loss(batch)) / batch["input_ids"].numel()
        speeds, _ = _train(model, self._batches(seed, self.steps), params, lr, self.steps)
        return {
            "score": self._accuracy(model),
            "trainables": sum(parameter.numel() for parameter in params),
            "kept_bytes_per_token": kept,
            "tokens_per_second": statistics.median(speeds),
        }

    def trial(self, variant: Variant, lr: float, *, steps: int) -> float:
        """Return the mean loss of the last third of a short training."""
        model, params = self._adapted(variant, 1000)
        _, losses = _train(model, self._batches(1000, 2 * steps), params, lr, 2 * steps)
        return statistics.mean(losses[-(len(losses) // 3) :])

    def _adapted(self, variant: Variant, seed: int) -> tuple[Classifier, list[nn.Parameter]]:
        torch.manual_seed(seed)
        model = Classifier(self.folder)
        for name, linear in _linears(model).items():
            bias = None if linear.bias is None else linear.bias.detach()
            replace_module(model, name, DenseBase(linear.weight.detach(), bias))
        bases = {name: m for name, m in model.named_modules() if isinstance(m, FrozenLinear)}
        choice = UPDATES[variant.kind].entry_choice(**variant.options)
        model.requires_grad_(False)
        places: dict[str, Tensor] = {}
        if choice is not None:
            places = largest_gradients(bases, choice, lambda: self._batches(seed, 8), model.loss)  # pyright: ignore[reportArgumentType]

        def adapt(name: str, base: FrozenLinear) -> AdaptedLinear:
            spec = LinearSpec(
                name=name,
                out_features=base.out_features,
                in_features=base.in_features,
                places=places.get(name),
                seed=seed,
            )
            return AdaptedLinear(base, build_from(UPDATES, variant.kind, variant.options, spec, where="update"))

        layers = attach(model, bases, adapt)
        model.head.requires_grad_(True)
        return model, [parameter for layer in layers.values() for parameter in layer.update.parameters()]

    def _batches(self, seed: int, steps: int) -> Iterator[Batch]:
        rows = self._rows("train")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        for step in range(steps):
            yield self._batch([rows[i] for i in order[step * BATCH : (step + 1) * BATCH]])

    def _batch(self, rows: list[dict[str, Any]]) -> Batch:
        texts = [row["sentence"] for row in rows]
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        return {**encoded, "labels": torch.tensor([row["label"] for row in rows])}

    def _rows(self, part: str) -> list[dict[str, Any]]:
        lines = (self.data / "mr" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @torch.no_grad()
    def _accuracy(self, model: Classifier) -> float:
        model.eval()
        rows = self._rows("valid")[:ROWS]
        batches = (self._batch(rows[i : i + 4 * BATCH]) for i in range(0, len(rows), 4 * BATCH))
        return 100 * sum(int((model(b).argmax(-1) == b["labels"]).sum()) for b in batches) / len(rows)


def _linears(model: Classifier) -> dict[str, nn.Linear]:
    """Return the linear layers of the blocks, not the pooler and the head."""
    return {n: m for n, m in model.named_modules() if ".layer." in f".{n}" and isinstance(m, nn.Linear)}


def _train(
    model: Classifier, batches: Iterator[Batch], params: list[nn.Parameter], lr: float, steps: int
) -> tuple[list[float], list[float]]:
    """Train without dropout and return tokens per second and loss of every step; rates fall linearly to 0."""
    model.eval()
    groups = [{"params": model.head.parameters(), "lr": HEAD_RATE}]
    groups += [{"params": params, "lr": lr}] if params else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 10 * (step + 1) / steps) * (1 - step / steps)
    )
    speeds, losses = [], []
    for batch in batches:
        begin = time.monotonic()
        loss = model.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        speeds.append(batch["input_ids"].numel() / (time.monotonic() - begin))
        losses.append(loss.item())
    return speeds, losses
