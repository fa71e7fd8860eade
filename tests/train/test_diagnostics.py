from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import job, train
from torch import Tensor

from qaft.bases.base import LinearSpec
from qaft.bases.dense import DenseBase
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.inputs import LayerInput, put_before
from qaft.quant import FP4, NF4, Affine
from qaft.quant.activation import TokenQuantizer
from qaft.quant.base import Quantizer
from qaft.rotation.hadamard import Hadamard
from qaft.train.diagnostics import Diagnostics, LayerState, as_record, dead_zone_warning
from qaft.updates import UPDATES

GRID = Affine(bits=4, group_size=16)


class Clock:
    """Every look at it costs a second; ``pass_`` lets training go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def layer(weight: Tensor, quantizer: Quantizer | None = GRID, **options: Any) -> AdaptedLinear:
    spec = LinearSpec(name="q", out_features=weight.shape[0], in_features=weight.shape[1])
    return AdaptedLinear(DenseBase(weight), UPDATES["dense"](spec, **options), quantizer=quantizer)


def measured(layers: dict[str, AdaptedLinear], step: int = 1) -> tuple[dict[str, LayerState], tuple[str, ...]]:
    return Diagnostics(layers, share=1e9).measure(step)


def move(layer: AdaptedLinear, change: Tensor) -> None:
    with torch.no_grad():
        next(iter(layer.update.parameters())).add_(change)


@pytest.mark.parametrize(
    "quantizer", [GRID, Affine(bits=3, group_size=None, symmetric=False), NF4(group_size=32), FP4(group_size=32)]
)
def test_the_error_of_the_weight_is_that_of_its_grid(quantizer: Quantizer, generator: torch.Generator) -> None:
    weight = torch.randn(8, 32, generator=generator)
    state = measured({"a": layer(weight, quantizer)})[0]["a"]
    expected = (quantizer(weight) - weight).square().sum() / weight.square().sum()
    assert state.delta_w == pytest.approx(float(expected))
    assert state.changed == state.expected == state.clip_fraction == 0
    assert (state.flip_rate, state.delta_x, state.delta_g) == (None, None, None)


def test_clipped_weights_are_those_beyond_the_range(generator: torch.Generator) -> None:
    weight = torch.randn(8, 32, generator=generator)
    clipped = Affine(bits=4, group_size=32, clip=0.5)
    codes = clipped.quantize(weight)
    steps = weight / codes.scale.float()
    lowest, highest = float(codes.values.min()), float(codes.values.max())
    beyond = ((steps > highest + 0.65) | (steps < lowest - 0.65)).float().mean()
    assert measured({"a": layer(weight, clipped)})[0]["a"].clip_fraction == pytest.approx(float(beyond))
    assert beyond > 0.05


def test_a_zero_that_gets_the_other_code_of_zero_has_not_changed() -> None:
    weight = torch.ones(1, 32)
    weight[0, 1::2] = -1e-4
    adapted = layer(weight, FP4(group_size=32))
    move(adapted, (weight < 0) * 2e-4)
    assert adapted.quantizer is not None
    before, after = (adapted.quantizer.quantize(w.detach()) for w in (weight, adapted.latent()))
    assert (before.values != after.values).float().mean() == 0.5
    state = measured({"a": adapted})[0]["a"]
    assert state.changed == 0 and state.expected > 0


def test_changed_codes_are_those_that_an_update_moved(generator: torch.Generator) -> None:
    adapted = layer(torch.randn(8, 32, generator=generator))
    base = adapted.base.dequantize()
    move(adapted, 0.1 * torch.randn(8, 32, generator=generator))
    state = measured({"a": adapted})[0]["a"]
    before, after = GRID.quantize(base), GRID.quantize(adapted.latent())
    assert state.changed == pytest.approx(float((before.values != after.values).float().mean()))
    steps = before.scale.float().repeat_interleave(16, dim=1)
    assert state.expected == pytest.approx(float(((adapted.latent().detach() - base).abs() / steps).mean()))


def test_the_expected_changes_are_found_off_the_grid(generator: torch.Generator) -> None:
    adapted = layer(torch.randn(64, 512, generator=generator))
    move(adapted, 0.01 * torch.randn(64, 512, generator=generator))
    state = measured({"a": adapted})[0]["a"]
    assert state.changed == pytest.approx(state.expected, rel=0.1)


def test_the_flip_rate_is_per_step(generator: torch.Generator) -> None:
    adapted = layer(torch.randn(8, 32, generator=generator))
    move(adapted, 0.2 * torch.randn(8, 32, generator=generator))
    diagnostics = Diagnostics({"a": adapted}, share=1e9)
    diagnostics.measure(5)
    before = GRID.quantize(adapted.latent()).values
    move(adapted, 0.2 * torch.randn(8, 32, generator=generator))
    state = diagnostics.measure(9)[0]["a"]
    flips = (GRID.quantize(adapted.latent()).values != before).float().mean()
    assert state.flip_rate == pytest.approx(float(flips) / 4)
    assert flips > 0.1


def test_inputs_are_measured_after_their_rotation(generator: torch.Generator) -> None:
    adapted = layer(torch.randn(8, 32, generator=generator))
    rotation, quantizer = Hadamard(32, seed=1), TokenQuantizer(bits=4)
    put_before(adapted, LayerInput(rotation=rotation, quantizer=quantizer))
    diagnostics = Diagnostics({"a": adapted}, share=1e9)
    x = torch.randn(2, 10, 32, generator=generator)
    adapted(x)
    state = diagnostics.measure(1)[0]["a"]
    turned = rotation(x.flatten(0, 1))
    errors = (quantizer(turned) - turned).square().sum(1) / turned.square().sum(1)
    assert state.delta_x == pytest.approx(float(errors.mean()))
    weight = adapted.base.dequantize()
    of_weight = (quantizer(turned) @ (GRID(weight) - weight).T).square().sum()
    assert state.delta_g == pytest.approx(float(of_weight / (turned @ weight.T).square().sum()), rel=1e-4)


def test_only_rows_that_move_are_sampled(generator: torch.Generator) -> None:
    adapted = layer(torch.randn(400, 32, generator=generator))
    change = torch.zeros(400, 32)
    change[7] = 3 * torch.randn(32, generator=generator)
    move(adapted, change)
    assert measured({"a": adapted})[0]["a"].changed > 0.5


def test_an_update_that_cannot_change_a_code_is_reported_once(generator: torch.Generator) -> None:
    on_grid = layer(GRID(torch.randn(16, 64, generator=generator)))
    free = layer(torch.randn(16, 64, generator=generator))
    layers = {"stuck": on_grid, "free": free}
    diagnostics = Diagnostics(layers, share=1e9)
    assert diagnostics.measure(1)[1] == ()
    # A tenth of a step: 102 changes are expected, and on the grid there is none.
    step = float(GRID.quantize(on_grid.latent()).scale.float().min()) / 10
    for adapted in layers.values():
        move(adapted, step * torch.ones(16, 64))
    assert diagnostics.measure(2)[1] == ("stuck",)
    assert diagnostics.measure(3)[1] == ()
    assert dead_zone_warning(("stuck",)).startswith("1 layers: this update cannot change any code")


def test_layers_take_turns_within_a_share_of_the_time(generator: torch.Generator) -> None:
    clock = Clock()
    layers = {name: layer(torch.randn(4, 16, generator=generator)) for name in "abcde"}
    diagnostics = Diagnostics(layers, share=0.1, clock=clock)
    seen = []
    for step in range(10):
        clock.pass_(19.0)  # and one second for a look: 20 in all, of which 2 may be used
        seen.append("".join(diagnostics.measure(step)[0]))
    assert seen == ["ab", "cd", "ea", "bc", "de", "ab", "cd", "ea", "bc", "de"]


def test_time_that_was_overdrawn_is_paid_back(generator: torch.Generator) -> None:
    clock = Clock()
    layers = {name: layer(torch.randn(4, 16, generator=generator)) for name in "abc"}
    diagnostics = Diagnostics(layers, share=0.01, clock=clock)
    seen = []
    for step in range(300):
        clock.pass_(9.0)
        seen.extend(diagnostics.measure(step)[0])
    # A tenth of a second each time, and a layer takes one: every tenth call measures.
    assert len(seen) == pytest.approx(30, abs=1)


def test_layers_without_a_quantizer_are_not_measured(generator: torch.Generator) -> None:
    assert measured({"a": layer(torch.randn(4, 16, generator=generator), None)}) == ({}, ())


def test_a_record_has_layers_and_their_means() -> None:
    states = {n: LayerState(delta_w=v, clip_fraction=0, changed=0, expected=1) for n, v in (("a", 0.1), ("b", 0.3))}
    record = as_record(states)
    assert record["quantization/delta_w"] == pytest.approx(0.2)
    assert record["quantization/delta_w/b"] == 0.3
    assert not any("expected" in key or "delta_x" in key for key in record)


def test_a_run_logs_them_and_trains_as_without(tiny_llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    qat = {"weights": {"bits": 4, "group_size": 32}, "activations": {"bits": 8}}
    raw = job(tiny_llama, tmp_path, qat=qat, select={"targets": ["q_proj", "v_proj"]})
    run = train(raw)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    found = {key for line in lines for key in line if key.startswith("quantization/")}
    names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(3) for part in "qv"]
    quantities = ("delta_w", "delta_x", "delta_g", "clip_fraction", "changed")
    assert {f"quantization/{q}/{names[0]}" for q in quantities} <= found
    monkeypatch.setattr(Diagnostics, "measure", lambda self, step: ({}, ()))
    raw["train"]["output"] = str(tmp_path / "without")
    again = train(raw)
    pairs = zip(run.loaded.model.parameters(), again.loaded.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
