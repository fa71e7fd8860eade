"""bitsandbytes checkpoints: the trained indices, maxima and codes in the library's own layout, read by its own client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from tiny_export import INFO, relative_difference, section, trained
from torch import Tensor
from transformers import AutoModelForCausalLM

from qaft.bases.bnb import dequantize_stored
from qaft.bases.bnb_layout import held_by
from qaft.errors import ExportError
from qaft.export import EXPORTERS
from qaft.export.tensors import linear_layers
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.inputs import LayerInput, put_before
from qaft.quant.activation import TokenQuantizer
from qaft.sections import GridSection, QatSection

export = EXPORTERS["bnb"]

NF4, FP4 = (QatSection(weights=GridSection.model_validate({"kind": kind})) for kind in ("nf4", "fp4"))
INT8 = QatSection(weights=GridSection(bits=8, group_size=None))
WIDE = 128
"""Widths that are multiples of the block of 64, which the library's kernels for CPUs need."""


def is_query_or_value(name: str) -> bool:
    return name.endswith(("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tiny_checkpoint import write_checkpoint

    def make(family: str = "llama", tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
        folder = tmp_path_factory.mktemp(family)
        return write_checkpoint(folder, family=family, tied=tied, dtype=dtype, intermediate_size=WIDE)

    return make


def client(folder: Path) -> Any:
    """What a user gets, before a forward pass; every tensor must have found its place."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def parts_of(stored: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of a layer as the library names them."""
    found = {n.removeprefix(f"{name}."): t for n, t in stored.items() if n.startswith(f"{name}.")}
    found.pop("bias", None)
    return {n.removeprefix("weight.") if n.startswith("weight.") else n: t for n, t in found.items()}


@pytest.mark.parametrize(
    ("kind", "group_size", "update"),
    [
        *(("nf4", size, update) for size in (32, 64) for update in ("dense", "lowrank", "both")),
        *(("fp4", size, "both") for size in (32, 64)),
    ],
)
def test_the_file_holds_the_trained_codes_and_the_reader_gets_the_trained_weights(
    wide: Any, tmp_path: Path, kind: Any, update: str, group_size: int
) -> None:
    qat = QatSection(weights=GridSection(kind=kind, group_size=group_size))
    loaded = trained(wide(), update, qat=qat)
    export(loaded, section("bnb"), tmp_path / "out", INFO)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    model = client(tmp_path / "out")
    for name, layer in linear_layers(loaded.model).items():
        assert isinstance(layer, AdaptedLinear)
        codes, parts = layer.quantized(), parts_of(stored, name)
        assert codes is not None
        state = bnb.QuantState.from_dict({k: v for k, v in parts.items() if k != "weight"}, torch.device("cpu"))
        packed = parts["weight"].flatten()
        assert torch.equal(
            torch.stack([packed >> 4, packed & 15], -1).view(codes.values.shape).to(torch.int8), codes.values
        )
        assert torch.equal(state.absmax.view(codes.scale.shape), codes.scale)
        assert (state.blocksize, state.dtype, state.quant_type) == (group_size, torch.bfloat16, kind)
        assert torch.equal(held_by(model.get_submodule(name)).dequantize(), layer.weight().detach())
    assert config_of(tmp_path / "out")["bnb_4bit_quant_type"] == kind
    assert relative_difference(loaded.model, model) <= 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("storage", ["int8", "int8_group"])
def test_int8_files_hold_the_trained_codes_and_127_scales(wide: Any, tmp_path: Path, storage: str, dtype: str) -> None:
    loaded = trained(wide("qwen2"), qat=INT8, storage=storage, dtype=dtype, select=is_query_or_value)
    export(loaded, section("bnb"), tmp_path / "out", INFO)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in linear_layers(loaded.model).items():
        parts = parts_of(stored, name)
        assert parts["weight"].dtype == torch.int8 and parts["SCB"].dtype == torch.float32
        assert int(parts["weight_format"]) == 0
        if isinstance(layer, AdaptedLinear):
            codes = layer.quantized()
            assert codes is not None and torch.equal(parts["weight"], codes.values)
            assert torch.equal(parts["SCB"] / 127, codes.scale.float().flatten())
            # The client's reading of a row's largest weight, code 127, is its SCB.
            torch.testing.assert_close(dequantize_stored(parts), codes.dequantize(torch.float32), rtol=3e-7, atol=0)
        elif storage == "int8":
            assert torch.equal(parts["weight"], layer.codes) and torch.equal(parts["SCB"], layer.absmax)  # type: ignore[arg-type]
    assert config_of(tmp_path / "out")["load_in_8bit"] is True


def test_the_codes_of_the_int8_grid_are_those_that_bitsandbytes_chooses(wide: Any) -> None:
    loaded = trained(wide(dtype=torch.float32), "dense", qat=INT8, dtype="float32")
    for layer in linear_layers(loaded.model).values():
        assert isinstance(layer, AdaptedLinear)
        latent = layer.latent().detach()
        theirs, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(latent)
        codes = layer.quantized()
        assert codes is not None
        # Scales keep 16 bits here: next to a boundary a code may lie on its other side.
        assert (codes.values != theirs).float().mean() < 2e-3
        assert (codes.values.int() - theirs.int()).abs().max() <= 1
        torch.testing.assert_close(codes.scale.flatten() * 127, absmax, rtol=2**-15, atol=0)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("qat", "storage", "tied"),
    [(NF4, "nf4", True), (NF4, "fp4", False), (NF4, "bf16", False), (FP4, "fp4", False), (FP4, "nf4", False)],
    ids=lambda value: value.weights.kind if isinstance(value, QatSection) else str(value),
)
def test_frozen_layers_are_written_from_their_bytes_beside_trained_ones(
    wide: Any, tmp_path: Path, qat: QatSection, storage: str, tied: bool, double_quant: bool
) -> None:
    if double_quant and storage == "bf16":
        pytest.skip("bf16 has no block scales")
    loaded = trained(wide("qwen2", tied), qat=qat, storage=storage, select=is_query_or_value, double_quant=double_quant)
    export(loaded, section("bnb", max_shard_gb=1e-5), tmp_path / "out", INFO)
    stored: dict[str, Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(path)
    model = client(tmp_path / "out")
    for name, layer in linear_layers(loaded.model).items():
        weight = layer.weight().detach() if isinstance(layer, AdaptedLinear) else layer.dequantize()
        module = model.get_submodule(name)
        dense = storage == "bf16" and not isinstance(layer, AdaptedLinear)
        assert torch.equal(module.weight if dense else held_by(module).dequantize(), weight), name
        if not dense and not isinstance(layer, AdaptedLinear):
            assert torch.equal(stored[f"{name}.weight"], layer.packed)  # type: ignore[arg-type]
            assert torch.equal(stored[f"{name}.weight.absmax"], layer.absmax)  # type: ignore[arg-type]
            assert (f"{name}.weight.nested_absmax" in stored) is double_quant
        if not dense:
            # Each weight names its own code book, whatever the config names.
            kind = qat.weights.kind if isinstance(layer, AdaptedLinear) else storage
            assert f"{name}.weight.quant_state.bitsandbytes__{kind}" in stored
            assert module.weight.quant_state.quant_type == kind
    frozen_kind = qat.weights.kind if storage == "bf16" else storage
    assert config_of(tmp_path / "out")["bnb_4bit_quant_type"] == frozen_kind
    skipped = config_of(tmp_path / "out")["llm_int8_skip_modules"]
    frozen = [n for n, m in linear_layers(loaded.model).items() if not isinstance(m, AdaptedLinear)]
    assert sorted(skipped) == sorted([*(frozen if storage == "bf16" else []), "lm_head"])
    assert relative_difference(loaded.model, model) <= 1e-5


@pytest.mark.parametrize(("qat", "storage"), [(NF4, "nf4"), (FP4, "fp4"), (INT8, "int8")], ids=["nf4", "fp4", "int8"])
def test_a_fresh_process_with_plain_transformers_gives_the_trained_logits(
    wide: Any, tmp_path: Path, qat: QatSection, storage: str
) -> None:
    loaded = trained(wide(), qat=qat, storage=storage, select=is_query_or_value)
    report = export(loaded, section("bnb", verify=True), tmp_path / "out", INFO)
    assert report.difference is not None and report.difference.max_relative <= 1e-5
    # The int8 product never rounds weights to 16 bits, which the run does.
    assert (report.rounding is None) is (storage != "int8")
    assert report.rounding is None or report.rounding.kl_mean < 1e-4
    assert any("compare" in note for note in report.notes)


@torch.no_grad()
def test_the_client_runs_int8_as_training_with_8_bit_inputs_does(wide: Any, tmp_path: Path) -> None:
    loaded = trained(wide(dtype=torch.float32), qat=INT8, storage="int8", dtype="float32", select=is_query_or_value)
    export(loaded, section("bnb"), tmp_path / "out", INFO)
    model = client(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj"
    theirs = model.get_submodule(name)
    theirs.state.threshold = 0.0
    # bitsandbytes quantizes inputs from fp16.
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).half().float()
    ours = loaded.model.get_submodule(name)(TokenQuantizer(bits=8)(x))
    assert float((theirs(x) - ours).norm() / ours.norm()) < 2e-4
    assert float((theirs(x) - ours).norm()) < 0.1 * float((ours - loaded.model.get_submodule(name)(x)).norm())


@pytest.mark.parametrize(("bits", "threshold"), [(None, 6.0), (4, 6.0), (8, 0.0)])
def test_outliers_keep_16_bits_unless_training_has_quantized_every_input_to_8(
    wide: Any, tmp_path: Path, bits: int | None, threshold: float
) -> None:
    loaded = trained(wide(), qat=INT8, storage="int8", select=is_query_or_value)
    for layer in linear_layers(loaded.model).values() if bits else ():
        put_before(layer, LayerInput(quantizer=TokenQuantizer(bits=bits or 8)))
    export(loaded, section("bnb"), tmp_path / "out", INFO)
    assert config_of(tmp_path / "out")["llm_int8_threshold"] == threshold


def test_rows_that_end_inside_a_block_are_written_right_and_noted(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint(), qat=NF4, storage="nf4", select=lambda name: name.endswith("q_proj"))
    report = export(loaded, section("bnb"), tmp_path / "out", INFO)
    assert any("down_proj" in note and "load it on a GPU" in note for note in report.notes)
    # The library's own kernel reads this layer wrongly on CPUs with AVX-512; what is held is right.
    assert relative_difference(loaded.model, client(tmp_path / "out")) <= 1e-5


def test_a_trained_model_is_exported_from_its_fused_basis(stories260k: Path, tmp_path: Path) -> None:
    loaded = trained(stories260k, qat=NF4, storage="nf4", select=is_query_or_value)
    export(loaded, section("bnb"), tmp_path / "out", INFO)
    assert relative_difference(loaded.model, client(tmp_path / "out")) <= 1e-5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "int 4": ({"qat": QatSection(weights=GridSection(bits=4, group_size=32))}, r"no grid Affine\(bits=4.*kind nf4"),
    "int 8 in groups": ({"qat": QatSection(weights=GridSection(bits=8, group_size=32))}, "group_size null"),
    "negative scales": (
        {"qat": QatSection(weights=GridSection(bits=8, group_size=None, range="signed_absmax"))},
        "negative scales",
    ),
    "int4 storage": ({"storage": "int4", "select": is_query_or_value}, "AffineBase.*none that it could be put onto"),
    "4 and 8 bits": (
        {"qat": NF4, "storage": "int8", "select": is_query_or_value},
        "4 bits and .* has 8.*model.storage",
    ),
    "nothing packed": ({}, "no layer of this run is on a grid.*nf4"),
    "adapter on nf4": ({"storage": "nf4", "size": 0.01}, "14 of 14.*lose more than 30%.*force: true"),
    "adapter on int8": ({"storage": "int8", "size": 0.003}, "14 of 14.*lose more than 30%.*force: true"),
    "adapter on fp4": ({"storage": "fp4", "size": 0.01}, "14 of 14.*lose more than 30%.*force: true"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_be_the_trained_model_is_refused(
    wide: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    loaded = trained(wide(), **{"group_size": 64, **options} if options.get("storage") == "int4" else options)
    with pytest.raises(ExportError, match=message):
        export(loaded, section("bnb"), tmp_path / "out", INFO)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8"])
def test_an_adapter_is_put_onto_its_packed_base_with_force_and_measured(
    wide: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], storage: str
) -> None:
    loaded = trained(wide(), storage=storage, size=0.003, select=is_query_or_value)
    report = export(loaded, section("bnb", force=True), tmp_path / "out", INFO)
    assert any("put onto the grid untrained" in note for note in report.notes)
    assert "what survives requantization" in capsys.readouterr().err
    name = "model.layers.0.self_attn.q_proj"
    held = held_by(client(tmp_path / "out").get_submodule(name)).dequantize().float()
    layer = loaded.model.get_submodule(name)
    assert isinstance(layer, AdaptedLinear)
    updated = layer.latent().detach()
    assert (held - updated).norm() > 0.3 * (layer.base.dequantize().float() - updated).norm()


def test_an_export_is_replaced_only_when_told_to(wide: Any, tmp_path: Path) -> None:
    loaded = trained(wide(), qat=NF4, select=is_query_or_value)
    export(loaded, section("bnb"), tmp_path / "out", INFO)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(ExportError, match="exists already"):
        export(loaded, section("bnb"), tmp_path / "out", INFO)
    export(loaded, section("bnb", force=True), tmp_path / "out", INFO)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
