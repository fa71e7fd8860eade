"""Every pair of choices over update, base, grid, gradient source and regularizer: it trains, or the table refuses it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qaft.bases import LinearSpec, build_base
from qaft.compat import INCOMPATIBLE
from qaft.data.batches import Batch
from qaft.errors import IncompatibleError
from qaft.gradients import SOURCES
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.attach import adapted_layers, trainable_parameters
from qaft.quant import QUANTIZERS, build_quantizer
from qaft.quant.affine import Affine
from qaft.recipe import Recipe, parse_recipe
from qaft.registry import build_from
from qaft.regularizers import REGULARIZERS
from qaft.regularizers.base import PassTerm, Penalty, StepRule
from qaft.train.closure import BatchClosure
from qaft.train.engine import AccelerateEngine
from qaft.train.loss import CausalLoss
from qaft.train.objective import Objective
from qaft.train.optimizers import make_optimizer
from qaft.train.regularized import RegularizedLoss
from qaft.updates import UPDATES

HIDDEN, VOCABULARY, ROWS = 64, 24, 4

OPTIONS: dict[str, dict[str, Any]] = {
    "bank": {"rank": 2, "blocks": 3},
    "gsoft": {"block": 8},
    "linchain": {"rank": 4},
    "lowrank": {"rank": 4},
    "pace": {"variant": "exact"},
    "proximal": {"weight": 1.0},
    "roco": {"rows": 2, "columns": 1},
    "sift": {"choose": "magnitude", "rate": 0.02},
}
GRIDS: dict[str, Any] = {
    "none": None,
    **{kind: {"weights": {"kind": kind, **({"group_size": 32} if kind == "int" else {})}} for kind in QUANTIZERS},
}
AXES: dict[str, tuple[str, ...]] = {
    "update": tuple(UPDATES),
    "base": ("fp32", "bf16", "nf4", "fp4", "int8", "int4", "int8_group"),
    "grid": tuple(GRIDS),
    "source": tuple(SOURCES),
    "regularizer": ("none", *REGULARIZERS),
}
PLAIN = {"update": "lowrank", "base": "fp32", "grid": "none", "source": "backprop", "regularizer": "none"}


def pairs() -> list[dict[str, str]]:
    """Every value of every axis with every value of every other, the rest plain."""
    found = {}
    for first, second in itertools.combinations(AXES, 2):
        for left, right in itertools.product(AXES[first], AXES[second]):
            case = {**PLAIN, first: left, second: right}
            if case["source"].startswith("lozo") and {first, second} != {"source", "update"}:
                # LOZO's own update, so that the pair is the only thing to fail.
                case["update"] = "bank"
            found[tuple(case.values())] = case
    return list(found.values())


def recipe(case: Mapping[str, str]) -> Recipe:
    terms = [] if case["regularizer"] == "none" else [section(case["regularizer"])]
    is_first_order = case["source"] in ("backprop", "extragradient")
    return parse_recipe(
        {
            "model": {"name": "m", "storage": case["base"], "group_size": 32, "dtype": "float32"},
            "update": section(case["update"]),
            "qat": GRIDS[case["grid"]],
            "gradient": {"kind": case["source"]},
            "regularize": terms,
            "optim": {"name": "adamw" if is_first_order else "sgd", "lr": 1e-2},
            "data": {"packing": False},
        }
    )


def section(kind: str) -> dict[str, Any]:
    return {"kind": kind, **OPTIONS.get(kind, {})}


class Decoder(nn.Module):
    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN).requires_grad_(False)
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": layer}) for layer in layers.values())

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + torch.tanh(layer["proj"](x))  # pyright: ignore[reportCallIssue, reportIndexIssue, reportArgumentType]
        return SimpleNamespace(last_hidden_state=x)


class Model(nn.Module):
    """A language model of two adapted layers, as the recipe has them."""

    def __init__(self, asked: Recipe) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = Decoder({index: adapted(asked, index) for index in range(2)})
            self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def adapted(asked: Recipe, index: int) -> AdaptedLinear:
    weight = torch.randn(HIDDEN, HIDDEN) / 8
    # A trained layer under a grid keeps latents off it, whatever the storage of the frozen ones.
    storage = "fp32" if asked.qat is not None else asked.model.storage
    bits = 8 if storage == "int8_group" else 4
    base = build_base(storage, weight, None, dtype=torch.float32, grid_quantizer=Affine(bits=bits, group_size=32))
    choice = UPDATES[asked.update.kind].entry_choice(**asked.update.options)
    spec = LinearSpec(
        name=f"model.layers.{index}.proj",
        out_features=HIDDEN,
        in_features=HIDDEN,
        places=None if choice is None else choice.largest(weight),
    )
    update = build_from(UPDATES, asked.update.kind, asked.update.options, spec, where="update")
    grid = None if asked.qat is None else build_quantizer(asked.qat.weights, scale_dtype=torch.float32)
    return AdaptedLinear(base, update, quantizer=grid)


def batch(step: int) -> Batch:
    tokens = torch.randint(VOCABULARY, (ROWS, 6), generator=torch.Generator().manual_seed(step))
    positions = torch.arange(6).expand_as(tokens)
    return Batch(
        input_ids=tokens,
        labels=tokens,
        position_ids=positions,
        attention_mask=None,
        num_targets=ROWS * 5,
        num_tokens=ROWS * 6,
        step=step,
    )


def train(asked: Recipe, steps: int = 2) -> Model:
    """The composition of ``qaft.training`` around a model without a checkpoint."""
    model = Model(asked)
    layers, params = adapted_layers(model), trainable_parameters(model)
    optimizer = make_optimizer([{"params": list(params.values()), "lr": 1e-2}], asked.optim, torch.device("cpu"))
    terms = [build_from(REGULARIZERS, s.kind, s.options, where="regularize") for s in asked.regularize]
    for term in terms:
        term.prepare(layers)
        if isinstance(term, StepRule):
            optimizer.register_step_pre_hook(lambda stepping, *_, rule=term: rule.before_step(stepping))
    passes = [term for term in terms if isinstance(term, PassTerm)]
    loss = CausalLoss(model)
    module = RegularizedLoss(loss, passes, layers) if passes else loss
    engine = AccelerateEngine(module, optimizer, clip=None, cpu=True)
    objective = Objective([term for term in terms if isinstance(term, Penalty)], layers)
    source = build_from(SOURCES, asked.gradient.kind, asked.gradient.options, where="gradient")
    module.train()
    for step in range(steps):
        closure = BatchClosure(
            objective=objective, engine=engine, batch=batch(step), noise_seed=step, run_seed=0, is_last=True
        )
        estimate = source(closure, params)
        engine.backward(estimate.surrogate)
        assert engine.step().stepped
        assert bool(torch.isfinite(estimate.loss))
    return model


def bits(model: Model) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("case", pairs(), ids=lambda case: "-".join(v for k, v in case.items() if v != PLAIN[k]))
def test_a_pair_trains_and_leaves_its_base_or_is_refused_by_a_row_of_the_table(case: dict[str, str]) -> None:
    try:
        asked = recipe(case)
    except IncompatibleError as error:
        assert any(str(error).startswith(f"{row.name}: ") for row in INCOMPATIBLE)
        return
    start, trained = Model(asked), train(asked)
    before, after = bits(start), bits(trained)
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = [
        not torch.equal(ours, theirs)
        for ours, theirs in zip(start.parameters(), trained.parameters(), strict=True)
        if ours.requires_grad
    ]
    assert any(moved)
    assert all(bool(torch.isfinite(p).all()) for p in trained.parameters())
