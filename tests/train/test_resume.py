from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import SignalBatches, TinyCausalLM, make_run, values
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qaft.errors import IncompatibleError, RecipeError
from qaft.gradients.base import Closure, GradientEstimate
from qaft.train.checkpoint import read_checkpoint, write_checkpoint
from qaft.train.loop import fit
from qaft.train.resume import restore, save_state, start_state
from qaft.train.run import TrainRun, TrainState


def tiny_llama(dropout: float) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=dropout,
        attn_implementation="sdpa",
    )
    torch.manual_seed(5)
    model = LlamaForCausalLM(config).requires_grad_(False)
    for layer in model.model.layers:
        # down_proj has 5120 entries: above 4096, from where adamw_8bit uses 8 bits.
        layer.mlp.down_proj.requires_grad_(True)
        layer.self_attn.v_proj.requires_grad_(True)
        layer.input_layernorm.requires_grad_(True)
    return model


def train_llama(folder: Path, *, dropout: float = 0.0, stop_after: int | None = None, **options: Any) -> TrainRun:
    """Train 6 steps, or stop after some as an interruption at a checkpoint does."""
    torch.manual_seed(99)
    run = make_run(folder, model=tiny_llama(dropout), steps=6, grad_accumulation=2, save_every=3, keep=9, **options)
    state = start_state(run)
    if stop_after is None:
        fit(run, state)
        return run

    class Stop(Exception):
        pass

    step = run.log.step

    def step_or_stop(number: int, *rest: Any) -> None:
        if number > stop_after:
            raise Stop
        step(number, *rest)

    run.log.step = step_or_stop  # type: ignore[method-assign]
    with pytest.raises(Stop):
        fit(run, state)
    return run


@pytest.mark.parametrize(
    ("optim", "dropout"),
    [
        ({"name": "adamw", "weight_decay": 0.1}, 0.0),
        ({"name": "adamw"}, 0.2),
        ({"name": "sgd", "momentum": 0.9}, 0.0),
        ({"name": "adafactor"}, 0.0),
        ({"name": "multiplicative", "additive": 0.5}, 0.0),
        ({"name": "adamw_8bit"}, 0.0),
    ],
)
def test_three_steps_and_three_after_a_resume_equal_six_bit_for_bit(
    tmp_path: Path, optim: dict, dropout: float
) -> None:
    options = {"dropout": dropout, "optim": {"lr": 3e-3, "lr_scale": {"v_proj": 4.0}, "warmup": 2, **optim}}
    whole = train_llama(tmp_path / "whole", **options)
    train_llama(tmp_path / "parts", stop_after=4, **options)  # one step beyond the checkpoint is lost
    resumed = train_llama(tmp_path / "parts", resume=True, **options)
    expected, ours = values(whole), values(resumed)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    left, right = (read_checkpoint(tmp_path / part / "checkpoint-6") for part in ("whole", "parts"))
    assert_same_state(left.state, right.state)


def assert_same_state(left: Any, right: Any) -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_state(left[key], right[key])
    elif isinstance(left, tuple | list):
        for a, b in zip(left, right, strict=True):
            assert_same_state(a, b)
    else:
        assert left == right


class NoisySource:
    """Draws from torch's global generator and counts its calls: both must continue after a resume."""

    needs_backward = True

    def __init__(self) -> None:
        self.calls = 0
        self.memory = torch.zeros(3)

    def __call__(self, closure: Closure, params: Any) -> GradientEstimate:
        loss = closure()
        self.calls += 1
        self.memory.add_(torch.rand(3))
        noise = sum((p * torch.randn_like(p)).sum() for p in params.values())
        return GradientEstimate(loss + 0.1 * self.calls * self.memory.sum() * noise, loss.detach())

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls, self.memory = state["calls"], state["memory"].clone()


def test_source_and_global_generator_continue(tmp_path: Path) -> None:
    whole = train_llama(tmp_path / "whole", source=NoisySource())
    train_llama(tmp_path / "parts", source=NoisySource(), stop_after=4)
    resumed = train_llama(tmp_path / "parts", source=NoisySource(), resume=True)
    assert resumed.source.calls == whole.source.calls == 12  # type: ignore[attr-defined]
    expected, ours = values(whole), values(resumed)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_source_stopped_inside_a_step_continues_from_its_beginning(tmp_path: Path) -> None:
    options = {"steps": 3, "grad_accumulation": 2}
    torch.manual_seed(7)
    whole = make_run(tmp_path / "whole", source=NoisySource(), **options)
    fit(whole, start_state(whole))
    torch.manual_seed(7)
    batches = SignalBatches(at=3, steps=3, accumulation=2)
    stopped = make_run(tmp_path / "parts", source=NoisySource(), batches=batches, **options)
    with pytest.raises(SystemExit):
        fit(stopped, start_state(stopped))
    assert stopped.source.calls == 3  # type: ignore[attr-defined]
    resumed = make_run(tmp_path / "parts", source=NoisySource(), resume=True, **options)
    fit(resumed, start_state(resumed))
    assert all(torch.equal(param, whole.params[name]) for name, param in resumed.params.items())


def test_metrics_of_a_resumed_run_are_those_of_the_whole_run(tmp_path: Path) -> None:
    import json

    train_llama(tmp_path / "whole", log_every=2)
    train_llama(tmp_path / "parts", log_every=2, stop_after=4)
    train_llama(tmp_path / "parts", log_every=2, resume=True)
    keys = ("step", "loss", "learning_rate", "grad_norm", "tokens")
    whole, parts = (
        [
            [json.loads(line)[key] for key in keys]
            for line in (tmp_path / part / "metrics.jsonl").read_text().splitlines()
        ]
        for part in ("whole", "parts")
    )
    # The checkpoint at step 3 lies inside the second window of two steps.
    assert [line[0] for line in whole] == [2, 4, 6]
    assert parts == whole


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_checkpoint_is_no_larger_than_parameters_and_optimizer_state(tmp_path: Path, name: str) -> None:
    model = tiny_llama(0.0).requires_grad_(False)
    model.lm_head = nn.Linear(32, 64, bias=False)
    for layer in model.model.layers:
        layer.mlp.requires_grad_(True)
    run = make_run(tmp_path, model=model, optim={"name": name}, steps=1)
    fit(run, start_state(run))
    trained = sum(p.numel() for p in run.params.values())
    frozen = sum(p.numel() for p in run.engine.module.parameters()) - trained
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").iterdir())
    state_bytes = {"adamw": 8, "adamw_8bit": 2}[name]
    # 48 KiB: JSON with the generators' states, file headers, and the 8-bit code books.
    assert trained * 4 < size <= trained * (4 + state_bytes) * 1.04 + 48 * 1024
    stored = read_checkpoint(tmp_path / "checkpoint-1").trainables
    assert stored.keys() == run.params.keys()
    assert frozen > 0


def saved(folder: Path, **options: Any) -> Path:
    run = make_run(folder, steps=4, **options)
    return save_state(run, TrainState(step=2, tokens=48).taken(run.source, run.engine.device))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optim": {"lr": 0.02}}, r"optim.lr: 0.01 -> 0.02"),
        ({"optim": {"lr_scale": {"v_proj": 2.0}}}, r"optim.lr_scale: \{\} -> \{'v_proj': 2.0\}"),
        ({"seed": 1}, "train.seed: 0 -> 1"),
        ({"steps": 8}, "train.steps: 4 -> 8"),
        ({"batch_size": 16}, "train.batch_size: 8 -> 16"),
        ({"grad_accumulation": 2, "seed": 3}, "train.grad_accumulation: 1 -> 2; train.seed: 0 -> 3"),
    ],
)
def test_other_recipe_is_refused_naming_each_value(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = saved(tmp_path)
    run = make_run(tmp_path, **{"steps": 4, **changed})
    before = values(run)
    with pytest.raises(IncompatibleError, match=f"another recipe .*{message}"):
        restore(run, path)
    assert all(torch.equal(before[name], param) for name, param in run.params.items())


def test_outputs_and_intervals_may_change(tmp_path: Path) -> None:
    path = saved(tmp_path)
    run = make_run(tmp_path, steps=4, save_every=1, keep=7, log_every=3, eval_every=2, resume=True)
    state = restore(run, path)
    assert (state.step, state.tokens) == (2, 48)


def other_names() -> nn.Module:
    model = TinyCausalLM()
    model.model.q_proj.bias = None
    model.model.embed.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: TinyCausalLM(hidden=8), r"model.q_proj.bias is \[16\] torch.float32 there, \[8\] torch.float32 here"),
        (
            lambda: TinyCausalLM().double(),
            r"model.q_proj.bias is \[16\] torch.float32 there, \[16\] torch.float64 here",
        ),
        (other_names, "model.embed.weight is not in the checkpoint; model.q_proj.bias is not in the model"),
    ],
)
def test_other_parameters_are_refused_by_name(tmp_path: Path, model: Any, message: str) -> None:
    path = saved(tmp_path)
    with pytest.raises(IncompatibleError, match=f"does not fit the model: {message}"):
        restore(make_run(tmp_path, model=model(), steps=4), path)


def test_long_lists_of_differences_are_cut(tmp_path: Path) -> None:
    class Many(TinyCausalLM):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(9)])

    path = saved(tmp_path)
    with pytest.raises(IncompatibleError, match="and 4 more"):
        restore(make_run(tmp_path, model=Many(), steps=4), path)


def test_new_run_in_a_used_folder_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(RecipeError, match=r"holds checkpoint-2 of an earlier run: set train.resume=true"):
        start_state(make_run(tmp_path, steps=4))


class Notes:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def step(self, *_: Any) -> None: ...

    def note(self, text: str) -> None:
        self.lines.append(text)

    def close(self) -> None: ...


def test_resume_without_a_checkpoint_starts_at_zero_and_says_so(tmp_path: Path) -> None:
    notes = Notes()
    state = start_state(make_run(tmp_path, steps=4, resume=True, console=notes))
    assert state == TrainState()
    assert notes.lines == [f"train.resume: no checkpoint in {tmp_path}, starting at step 0"]


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=6, save_every=2, keep=3)
    fit(run, start_state(run))
    (tmp_path / "checkpoint-6" / "trainables.safetensors").unlink()
    again = make_run(tmp_path, steps=6, save_every=2, keep=3, resume=True)
    with pytest.warns(UserWarning, match="checkpoint-6 is passed over"):
        state = start_state(again)
    assert state.step == 4
    fit(again, state)
    assert all(torch.equal(param, values(run)[name]) for name, param in again.params.items())


def test_checkpoint_of_another_torch_warns_and_continues(tmp_path: Path) -> None:
    stored = read_checkpoint(saved(tmp_path / "first"))
    versions = {**stored.state["versions"], "torch": "1.0"}
    path = write_checkpoint(
        tmp_path,
        type(stored)(step=2, trainables=stored.trainables, state={**stored.state, "versions": versions}),
        keep=1,
    )
    run = make_run(tmp_path, steps=4)
    with pytest.warns(UserWarning, match=r"was written with .*'torch': '1.0'.*may differ in rounding"):
        assert restore(run, path).step == 2


def test_learning_rate_continues_where_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=6, save_every=3, optim={"schedule": "linear", "lr": 0.6})
    rates = []
    step = run.log.step
    run.log.step = lambda number, losses, lr, *rest: (rates.append(lr["base"]), step(number, losses, lr, *rest))  # type: ignore[method-assign,assignment,return-value]
    fit(run, start_state(run))
    assert rates == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    again = make_run(tmp_path, steps=6, save_every=3, optim={"schedule": "linear", "lr": 0.6}, resume=True)
    restore(again, tmp_path / "checkpoint-3")
    assert math.isclose(again.learning_rates()["base"], 0.3)
