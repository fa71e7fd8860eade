"""Scalings of channels disappear into norms and scales: no code of the packed base changes, in no export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import write_checkpoint
from tiny_job import job, quiet, train

from qaft.bases.affine import AffineBase
from qaft.build import Run, build_run
from qaft.commands.export import export_run
from qaft.errors import ExportError
from qaft.evaluate.difference import compare_logits, logits_of, prompt_ids
from qaft.export.fold import plan_fold
from qaft.export.folded import folded, serving_form
from qaft.layers.attach import adapted_layers
from qaft.recipe import parse_recipe
from qaft.sections import ExportSection

PACKED = "compressed-tensors"


def recipe(checkpoint: Path, folder: Path, update: dict[str, Any], targets: list[str], **model: Any) -> dict[str, Any]:
    return job(
        checkpoint,
        folder,
        model={"storage": "int4", "group_size": 32, **model},
        select={"targets": targets},
        update=update,
        optim={"lr": 3e-2},
    )


def export(run: Run, format: str, folder: Path, **options: Any) -> Path:
    export_run(run, ExportSection(format=format, out=str(folder), **{"verify": False, **options}), quiet())
    return folder


def distance(run: Run, folder: Path) -> float:
    ids = prompt_ids(run.loaded.tokenizer)
    return compare_logits(logits_of(run.loaded.model, ids), logits_of(folder, ids)).max_relative


SSB = {"kind": "ssb", "tie": True}
CASES = {"ssb": (SSB, ["all"]), "ia3": ({"kind": "ia3"}, ["k_proj", "v_proj", "down_proj"])}


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: Any) -> Run:
    update, targets = CASES[request.param]
    return train(recipe(tiny_llama, tmp_path_factory.mktemp("fold"), update, targets))


def test_codes_are_those_of_the_base_and_scales_are_scaled_and_rounded_once(run: Run, tmp_path: Path) -> None:
    stored = load_file(export(run, PACKED, tmp_path / "out") / "model.safetensors")
    for name, layer in run.layers.items():
        base, factor = layer.base, 1 + layer.update.outputs.detach()
        assert isinstance(base, AffineBase) and bool((factor != 1).any())
        assert torch.equal(stored[f"{name}.weight_packed"], base.weight_packed)
        assert torch.equal(stored[f"{name}.weight_scale"], base.weight_scale * factor[:, None])


def test_norms_take_the_shared_scaling_and_linears_that_no_norm_feeds_have_none(run: Run, tmp_path: Path) -> None:
    stored = load_file(export(run, PACKED, tmp_path / "out") / "model.safetensors")
    norms = {n: p for n, p in run.loaded.model.named_parameters() if "norm" in n}
    for name, norm in norms.items():
        reader = name.replace("input_layernorm.weight", "self_attn.q_proj").replace(
            "post_attention_layernorm.weight", "mlp.gate_proj"
        )
        update = run.layers[reader].update if reader in run.layers else None
        shared = getattr(update, "inputs", None)
        factor = 1 if shared is None else 1 + shared.detach()
        assert torch.equal(stored[name], norm * factor)


@pytest.mark.parametrize("format", [PACKED, "merged"])
def test_a_folded_export_is_the_trained_function_to_the_rounding_of_scales(
    run: Run, tmp_path: Path, format: str
) -> None:
    assert distance(run, export(run, format, tmp_path / "out")) <= 1e-5
    assert "every code is that of the base" in (tmp_path / "out" / "README.md").read_text()


def test_merged_weights_lie_on_the_scaled_grid(run: Run, tmp_path: Path) -> None:
    stored = load_file(export(run, "merged", tmp_path / "out") / "model.safetensors")
    packed = load_file(export(run, PACKED, tmp_path / "packed") / "model.safetensors")
    for name, layer in run.layers.items():
        codes = layer.base.qtensor().values.float().unflatten(1, (-1, 32))  # type: ignore[operator]
        grid = codes * packed[f"{name}.weight_scale"].unsqueeze(-1)
        assert torch.equal(stored[f"{name}.weight"], grid.flatten(1))


def test_the_live_run_is_untouched_by_its_export(run: Run, tmp_path: Path) -> None:
    ids = prompt_ids(run.loaded.tokenizer)
    before, layers = logits_of(run.loaded.model, ids), adapted_layers(run.loaded.model)
    export(run, PACKED, tmp_path / "out", verify=False)
    assert adapted_layers(run.loaded.model) == layers
    assert compare_logits(before, logits_of(run.loaded.model, ids)).max_abs == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_scales_are_within_half_a_unit_of_the_exact_product(
    tiny_llama: Path, tmp_path: Path, dtype: str
) -> None:
    run = train(recipe(tiny_llama, tmp_path, SSB, ["all"], dtype=dtype))
    stored = load_file(export(run, PACKED, tmp_path / "out") / "model.safetensors")
    unit = torch.finfo(getattr(torch, dtype)).eps / 2
    for name, layer in run.layers.items():
        exact = layer.base.weight_scale.double() * (1 + layer.update.outputs.detach().double())[:, None]  # type: ignore[union-attr, operator]
        error = (stored[f"{name}.weight_scale"].double() - exact).abs()
        assert bool((error <= unit * exact.abs() * (1 + 1e-5) + torch.finfo(torch.float16).tiny).all())
        assert torch.equal(stored[f"{name}.weight_packed"], layer.base.weight_packed)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_bitsandbytes_export_holds_the_codes_of_the_base_and_the_scaled_scales(
    tiny_llama: Path, tmp_path: Path, storage: str
) -> None:
    run = train(recipe(tiny_llama, tmp_path, SSB, ["all"], storage=storage))
    stored = load_file(export(run, "bnb", tmp_path / "out") / "model.safetensors")
    scales = "SCB" if storage == "int8" else "weight.absmax"
    for name, layer in run.layers.items():
        base: Any = layer.base
        factor = 1 + layer.update.outputs.detach()  # type: ignore[union-attr, operator]
        assert torch.equal(stored[f"{name}.weight"], base.codes if storage == "int8" else base.packed)
        expected = base.absmax.view(len(factor), -1) * factor.unsqueeze(1)  # type: ignore[arg-type]
        assert torch.equal(stored[f"{name}.{scales}"], expected.flatten())


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8"])
def test_block_and_row_scales_of_bitsandbytes_take_the_outputs_with_one_rounding(
    tiny_llama: Path, tmp_path: Path, storage: str
) -> None:
    run = train(recipe(tiny_llama, tmp_path, SSB, ["all"], storage=storage))
    ids = prompt_ids(run.loaded.tokenizer)
    before = logits_of(run.loaded.model, ids)
    exact = {
        n: layer.base.dequantize() * (1 + layer.update.outputs.detach())[:, None] for n, layer in run.layers.items()
    }  # type: ignore[union-attr, operator]
    with serving_form(run.loaded, ExportSection(format="merged")) as notes:
        for name, expected in exact.items():
            base: Any = run.loaded.model.get_submodule(name)
            codes = "codes" if storage == "int8" else "packed"
            assert getattr(base, codes) is getattr(run.layers[name].base, codes)
            torch.testing.assert_close(base.dequantize(), expected, rtol=4e-7, atol=0)
        assert compare_logits(before, logits_of(run.loaded.model, ids)).max_relative <= 1e-5
    assert "rounding moves logits by" in notes[1]


def test_scalings_of_what_values_and_up_have_written_pass_through_their_rows(tmp_path: Path) -> None:
    """No grouped heads and biases: o_proj's inputs are v_proj's outputs, down_proj's are up_proj's."""
    checkpoint = write_checkpoint(
        tmp_path / "base", dtype=torch.float32, num_key_value_heads=4, attention_bias=True, mlp_bias=True
    )
    run = train(recipe(checkpoint, tmp_path, {"kind": "ssl"}, ["o_proj", "down_proj"]))
    assert all(bool(layer.update.inputs.any()) for layer in run.layers.values())
    fold = plan_fold(run.loaded)
    assert fold.passed.keys() == {
        f"model.layers.{i}.{leaf}" for i in range(2) for leaf in ("self_attn.v_proj", "mlp.up_proj")
    }
    assert not fold.norms and not fold.outputs
    assert distance(run, export(run, PACKED, tmp_path / "out")) <= 1e-5


@pytest.mark.parametrize(
    ("family", "kind", "targets", "options"),
    [
        ("gemma", "ssb", ["all"], {"head_dim": 16}),
        ("phi3", "ssl", ["qkv_proj", "gate_up_proj", "down_proj"], {"pad_token_id": 0}),
        ("gpt_neox", "ssb", ["query_key_value", "dense_h_to_4h"], {}),
        ("opt", "ssl", ["out_proj"], {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    ],
)
def test_every_kind_of_norm_and_of_stacked_rows_takes_up_scalings(
    tmp_path: Path, family: str, kind: str, targets: list[str], options: dict[str, Any]
) -> None:
    heads = 2 if family == "gemma" else 4
    checkpoint = write_checkpoint(
        tmp_path / "base", family=family, dtype=torch.float32, num_key_value_heads=heads, **options
    )
    run = train(recipe(checkpoint, tmp_path, {"kind": kind, **({"tie": True} if kind == "ssb" else {})}, targets))
    ids = prompt_ids(run.loaded.tokenizer)
    before = logits_of(run.loaded.model, ids)
    with folded(run.loaded, plan_fold(run.loaded)):
        assert not adapted_layers(run.loaded.model)
        assert compare_logits(before, logits_of(run.loaded.model, ids)).max_relative <= 1e-5


@pytest.mark.parametrize(
    ("update", "targets", "reason"),
    [
        (
            {"kind": "ssl"},
            ["q_proj"],
            r"q_proj: .* cannot be folded into .*input_layernorm, which .*k_proj reads without",
        ),
        ({"kind": "ssb"}, ["gate_proj", "up_proj"], r"which .*up_proj reads without it; set update\.tie to true"),
        ({"kind": "ssl"}, ["o_proj"], r"4 query heads share 2 value heads"),
    ],
)
def test_what_cannot_be_folded_is_refused_before_training(
    tiny_llama: Path, tmp_path: Path, update: dict[str, Any], targets: list[str], reason: str
) -> None:
    raw = {**recipe(tiny_llama, tmp_path, update, targets), "export": [{"format": PACKED}]}
    with pytest.raises(ExportError, match=reason):
        train(raw)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("checkpoint*"))


def test_what_cannot_be_folded_is_merged_with_the_reason(tiny_llama: Path, tmp_path: Path) -> None:
    run = build_run(parse_recipe(recipe(tiny_llama, tmp_path, {"kind": "ssl"}, ["q_proj"])))
    with serving_form(run.loaded, ExportSection(format="merged")) as notes:
        assert len(adapted_layers(run.loaded.model)) == 3
    assert "merged weight by weight, which leaves the grid of the base: model.layers.0.self_attn.q_proj" in notes[0]


def test_blocks_across_rows_and_quantized_scales_are_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "base", dtype=torch.float32)
    run = build_run(parse_recipe(recipe(checkpoint, tmp_path, {"kind": "ia3"}, ["down_proj"], storage="nf4")))
    with pytest.raises(ExportError, match=r"blocks of 64 weights cross its rows of 96.*`merged`"):
        plan_fold(run.loaded)
