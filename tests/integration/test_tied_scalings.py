"""Tied scalings disappear into the model: norm weights take the inputs', packed scales the outputs'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import job, train

from qaft.bases.affine import AffineBase
from qaft.build import Run, build_run, restore_run
from qaft.errors import RecipeError
from qaft.layers.attach import replace_module, trainable_parameters
from qaft.recipe import parse_recipe

TOKENS = torch.arange(12)[None]


def recipe(checkpoint: Path, folder: Path, targets: list[str], **model: Any) -> dict[str, Any]:
    raw = job(
        checkpoint,
        folder,
        model=model,
        select={"targets": targets},
        update={"kind": "ssb", "tie": True},
        optim={"lr": 3e-2},
    )
    raw["data"]["valid"] = None
    return raw


def logits(run: Run) -> torch.Tensor:
    with torch.no_grad():
        return run.loaded.model.eval()(input_ids=TOKENS).logits


def test_each_norm_has_one_scaling_and_what_linears_write_has_none(tiny_llama: Path, tmp_path: Path) -> None:
    run = build_run(parse_recipe(recipe(tiny_llama, tmp_path, ["all"])))
    names = [name for name in trainable_parameters(run.loaded.model) if name.endswith("inputs")]
    assert names == [
        f"model.layers.{i}.{first}.update.inputs" for i in range(3) for first in ("self_attn.q_proj", "mlp.gate_proj")
    ]
    assert run.layers["model.layers.1.self_attn.o_proj"].update.inputs is None
    assert run.layers["model.layers.1.mlp.down_proj"].update.inputs is None


def test_a_tied_run_is_restored(tiny_llama: Path, tmp_path: Path) -> None:
    run = train(recipe(tiny_llama, tmp_path, ["all"]))
    restored = restore_run(run.folder)
    assert torch.equal(logits(run), logits(restored))
    shared = {id(restored.layers[f"model.layers.0.self_attn.{p}_proj"].update.inputs) for p in "qkv"}
    assert len(shared) == 1


def test_folding_into_norms_and_scales_keeps_every_code_and_the_function(tiny_llama: Path, tmp_path: Path) -> None:
    run = train(recipe(tiny_llama, tmp_path, ["all"], storage="int4", group_size=32))
    expected, before = logits(run), {}
    for name, layer in run.layers.items():
        base = layer.base
        assert isinstance(base, AffineBase)
        before[name] = base.weight_packed.clone()
        # fp32 scales: in 16 bits each would be rounded once, and the codes would still be the same.
        base.weight_scale = base.weight_scale.float() * (1 + layer.update.outputs.detach())[:, None]
        replace_module(run.loaded.model, name, base)
    for i in range(3):
        for norm, reader in (("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.gate_proj")):
            scaling = run.layers[f"model.layers.{i}.{reader}"].update.inputs.detach()
            run.loaded.model.get_submodule(f"model.layers.{i}.{norm}").weight.data *= 1 + scaling
            assert bool(scaling.any())
    torch.testing.assert_close(logits(run), expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(run.layers[name].base.weight_packed, codes) for name, codes in before.items())


def test_a_norm_of_which_a_reader_is_frozen_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"update\.tie: model\.layers\.0\.self_attn\.q_proj.*without .*k_proj"):
        build_run(parse_recipe(recipe(tiny_llama, tmp_path, ["q_proj", "v_proj"])))
