"""Layers that read one norm share a learned rotation, or the subspaces of zeroth-order steps, and the work of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import job, train
from torch import Tensor, nn

from qaft.build import Run, build_run, restore_run
from qaft.layers.attach import trainable_parameters
from qaft.recipe import parse_recipe
from qaft.updates import gsoft
from qaft.updates.bank import Bank
from qaft.updates.shared_input import SharedInput

TOKENS = torch.arange(24).view(2, 12)


def recipe(checkpoint: Path, folder: Path, targets: list[str], **options: Any) -> dict[str, Any]:
    return job(
        checkpoint,
        folder,
        select={"targets": targets},
        update={"kind": "gsoft", "block": 8, **options},
        optim={"lr": 1e-2},
        train={"steps": 3},
    )


def moved(run: Run, seed: int = 1) -> Run:
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable_parameters(run.loaded.model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return run


def loss(run: Run) -> Tensor:
    return run.loaded.model(input_ids=TOKENS, labels=TOKENS).loss


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["all"], ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]),
        (["k_proj", "v_proj"], ["self_attn.k_proj"]),
    ],
)
def test_each_input_has_one_rotation(tiny_llama: Path, tmp_path: Path, targets: list[str], expected: list[str]) -> None:
    run = build_run(parse_recipe(recipe(tiny_llama, tmp_path, targets)))
    names = [name for name in trainable_parameters(run.loaded.model) if name.endswith("right")]
    assert names == [f"model.layers.{i}.{layer}.update.right" for i in range(3) for layer in expected]
    apart = build_run(parse_recipe(recipe(tiny_llama, tmp_path, targets, share=False)))
    names = [name for name in trainable_parameters(apart.loaded.model) if name.endswith("right")]
    assert names == [f"{name}.update.right" for name in apart.layers]


def test_the_gradient_of_a_shared_rotation_is_the_sum_of_those_apart(tiny_llama: Path, tmp_path: Path) -> None:
    shared = moved(build_run(parse_recipe(recipe(tiny_llama, tmp_path, ["all"]))))
    apart = build_run(parse_recipe(recipe(tiny_llama, tmp_path, ["all"], share=False)))
    for name, layer in apart.layers.items():
        for leaf, parameter in layer.update.named_parameters():
            parameter.data.copy_(getattr(shared.layers[name].update, leaf).data)
    values = [loss(run) for run in (shared, apart)]
    for value in values:
        value.backward()
    torch.testing.assert_close(*values)
    sums: dict[int, Tensor] = {}
    for name, layer in apart.layers.items():
        for leaf, parameter in layer.update.named_parameters():
            assert parameter.grad is not None
            key = id(getattr(shared.layers[name].update, leaf))
            sums[key] = parameter.grad + sums.get(key, 0)
    for parameter in trainable_parameters(shared.loaded.model).values():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, sums[id(parameter)], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_input_is_turned_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    raw = recipe(tiny_llama, tmp_path, ["all"])
    raw["train"]["gradient_checkpointing"] = checkpointing
    run, turned = moved(build_run(parse_recipe(raw))), []
    rotated = gsoft.rotated
    monkeypatch.setattr(gsoft, "rotated", lambda x, *args, **kwargs: turned.append(x) or rotated(x, *args, **kwargs))
    run.loaded.model.train()
    found = loss(run)
    # q, k and v; o; gate and up; down
    assert len(turned) == 3 * 4
    found.backward()
    assert len(turned) == 3 * 4 * (2 if checkpointing else 1)


def test_a_shared_rotation_is_restored_and_exported(tiny_llama: Path, tmp_path: Path) -> None:
    raw = recipe(tiny_llama, tmp_path, ["all"])
    run = train(raw | {"export": [{"format": "merged"}]})
    restored = restore_run(run.folder)
    model: nn.Module = restored.loaded.model
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, run.loaded.model.eval()(input_ids=TOKENS).logits)
    shared = {id(restored.layers[f"model.layers.0.self_attn.{p}_proj"].update.right) for p in "qkv"}
    assert len(shared) == 1
    assert bool(restored.layers["model.layers.0.self_attn.q_proj"].update.right.any())
    assert (run.folder / "export-merged" / "qaft_check.json").exists()


def bank(checkpoint: Path, folder: Path, **options: Any) -> Run:
    raw = job(checkpoint, folder, select={"targets": ["all"]}, gradient={"kind": "lozo"}, optim={"name": "sgd"})
    return moved(build_run(parse_recipe(raw | {"update": {"kind": "bank", "rank": 2, "blocks": 3, **options}})))


def test_layers_that_read_one_norm_have_one_basis(tiny_llama: Path, tmp_path: Path) -> None:
    def bases(run: Run) -> list[str]:
        return [str(layer.update.packed.tolist()) for layer in run.layers.values()]

    shared, apart = bases(bank(tiny_llama, tmp_path)), bases(bank(tiny_llama, tmp_path, share=False))
    assert len(apart) == len(set(apart)) == 3 * 7
    assert len(set(shared)) == 3 * 4
    q, k, v, o, gate, up, down = shared[:7]
    assert q == k == v and gate == up and len({q, o, gate, down}) == 4


def test_an_input_is_projected_once_with_the_bits_of_layers_apart(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = bank(tiny_llama, tmp_path), []
    basis = Bank.basis
    monkeypatch.setattr(Bank, "basis", lambda self, *args: calls.append(self) or basis(self, *args))
    with torch.inference_mode():
        expected = run.loaded.model(input_ids=TOKENS).logits
        assert len(calls) == 3 * 4
        for layer in run.layers.values():
            layer.update.of_input = SharedInput()
        assert torch.equal(run.loaded.model(input_ids=TOKENS).logits, expected)
    assert len(calls) == 3 * (4 + 7)
