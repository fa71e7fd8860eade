"""Every update and every regularizer in the job of the command line: what is trained, restored and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import job, losses, train

from qaft.build import restore_run
from qaft.errors import IncompatibleError
from qaft.recipe import parse_recipe
from qaft.updates import UPDATES

OPTIONS: dict[str, dict[str, Any]] = {"gsoft": {"block": 8}, "roco": {"rows": 4}, "bank": {"rank": 2, "blocks": 4}}
QAT = {"weights": {"bits": 4, "group_size": 32}}


def recipe(checkpoint: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    raw = job(checkpoint, folder, **{"train": {"steps": 3}, "optim": {"lr": 1e-2}, **sections})
    raw["data"]["valid"] = None
    return raw


@pytest.mark.parametrize("qat", [None, QAT], ids=["adapter", "qat"])
@pytest.mark.parametrize("kind", sorted(UPDATES))
def test_every_update_trains_and_is_restored(tiny_llama: Path, tmp_path: Path, kind: str, qat: Any) -> None:
    update = {"kind": kind, **OPTIONS.get(kind, {})}
    run = train(recipe(tiny_llama, tmp_path, update=update, qat=qat))
    restored = restore_run(run.folder)
    for name, layer in run.layers.items():
        assert torch.equal(layer.weight(), restored.layers[name].weight())
        start = layer.base.dequantize().float()
        assert not torch.equal(layer.update.merge(start), start)
    trained = losses(run.folder)
    assert trained[-1] < trained[0]


@pytest.mark.parametrize("qat", [None, QAT], ids=["adapter", "qat"])
@pytest.mark.parametrize(
    "regularize",
    [
        [{"kind": "kl"}],
        # Not selective: while the loss falls the selective rule has nothing to pull back.
        [{"kind": "proximal", "weight": 5.0, "selective": False}],
        [{"kind": "pace", "weight": 1e-3, "variant": "exact"}],
        [{"kind": "mpc", "weight": 1e-6}],
        [{"kind": "pace", "weight": 1e-3}, {"kind": "kl"}, {"kind": "proximal"}],
    ],
    ids=lambda terms: "+".join(term["kind"] for term in terms),
)
def test_a_regularized_run_starts_at_the_loss_of_the_plain_one(
    tiny_llama: Path, tmp_path: Path, regularize: list[dict[str, Any]], qat: Any
) -> None:
    folders = [tmp_path / "plain", tmp_path / "regularized"]
    found = []
    for folder, terms in zip(folders, ([], regularize), strict=True):
        folder.mkdir()
        update = {"kind": "lowrank", "rank": 4}
        train(recipe(tiny_llama, folder, update=update, qat=qat, regularize=terms))
        found.append(losses(folder / "run"))
    halved = any(term["kind"] == "pace" and "variant" not in term for term in regularize)
    if not halved:
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1] != found[0]


def test_the_fp_teacher_pulls_towards_the_unquantized_model(tiny_llama: Path, tmp_path: Path) -> None:
    found = []
    for teacher in ("base", "fp"):
        folder = tmp_path / teacher
        folder.mkdir()
        terms = [{"kind": "kl", "weight": 5.0, "teacher": teacher}]
        train(recipe(tiny_llama, folder, qat=QAT, regularize=terms))
        found.append(losses(folder / "run")[0])
    # At the start the base teacher has nothing to say, and the other one says what rounding has changed.
    assert found[1] > found[0]


@pytest.mark.parametrize("kind", ["dense", "gsoft", "ia3", "sift", "ssb", "ssl"])
def test_a_lora_export_of_an_update_of_any_rank_is_refused_with_formats_that_can(kind: str) -> None:
    raw = {"model": {"name": "m"}, "update": {"kind": kind}, "export": [{"format": "peft"}]}
    with pytest.raises(IncompatibleError, match="export `merged`"):
        parse_recipe(raw)


def test_a_chain_is_exported_as_a_plain_lora(tiny_llama: Path, tmp_path: Path) -> None:
    update = {"kind": "linchain", "rank": 4, "depth": 2}
    run = train(recipe(tiny_llama, tmp_path, update=update, export=[{"format": "peft", "verify": False}]))
    from safetensors.torch import load_file

    stored = load_file(run.folder / "export-peft" / "adapter_model.safetensors")
    for name, layer in run.layers.items():
        up, down = (stored[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
        expected = layer.update.merge(torch.zeros(layer.out_features, layer.in_features)).detach()
        assert down.shape[0] == 4
        torch.testing.assert_close(up @ down, expected)
