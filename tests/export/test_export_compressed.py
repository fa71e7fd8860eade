"""Packed checkpoints: trained codes and scales in the file, training's weights after loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from tiny_export import INFO, relative_difference, reloaded, section, trained

from qaft.bases.affine import AffineBase
from qaft.errors import ExportError, RecipeError
from qaft.export import EXPORTERS
from qaft.export.tensors import linear_layers
from qaft.layers.adapted import AdaptedLinear
from qaft.sections import GridSection, QatSection

export = EXPORTERS["compressed-tensors"]


def qat(bits: int = 4, group_size: int | None = 32, symmetric: bool = True, rotation: str = "hadamard") -> QatSection:
    return QatSection(weights=GridSection(bits=bits, group_size=group_size, symmetric=symmetric), rotation=rotation)


def is_query_or_value(name: str) -> bool:
    return name.endswith(("q_proj", "v_proj"))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, None)])
@pytest.mark.parametrize("update", ["dense", "lowrank", "both"])
def test_the_file_holds_the_trained_codes_and_the_reader_gets_the_trained_weights(
    checkpoint: Any, tmp_path: Path, update: str, bits: int, group_size: int | None, symmetric: bool
) -> None:
    loaded = trained(checkpoint(), update, qat=qat(bits, group_size, symmetric))
    export(loaded, section("compressed-tensors"), tmp_path / "out", INFO)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    model = reloaded(tmp_path / "out")
    for name, layer in linear_layers(loaded.model).items():
        assert isinstance(layer, AdaptedLinear)
        codes = layer.quantized()
        assert codes is not None
        shape = torch.Size(stored[f"{name}.weight_shape"].tolist())
        assert torch.equal(unpack_from_int32(stored[f"{name}.weight_packed"], bits, shape), codes.values)
        assert torch.equal(stored[f"{name}.weight_scale"], codes.scale)
        assert (f"{name}.weight_zero_point" in stored) is not symmetric
        if codes.zero_point is not None:
            packed = stored[f"{name}.weight_zero_point"]
            assert torch.equal(unpack_from_int32(packed, bits, codes.zero_point.shape, packed_dim=0), codes.zero_point)
        assert torch.equal(model.get_submodule(name).weight, layer.weight().detach())
    assert relative_difference(loaded.model, model) <= 1e-5


@pytest.mark.parametrize(
    "options", [{"range": "signed_absmax"}, {"range": "mse"}, {"range": "rms"}, {"symmetric": False, "clip": 0.95}]
)
def test_every_range_of_an_int_grid_is_read_back_as_trained(checkpoint: Any, tmp_path: Path, options: Any) -> None:
    grid = QatSection(weights=GridSection(bits=4, group_size=32, **options))
    loaded = trained(checkpoint(), qat=grid, storage="int4", select=is_query_or_value)
    export(loaded, section("compressed-tensors"), tmp_path / "out", INFO)
    model = reloaded(tmp_path / "out")
    for name, layer in linear_layers(loaded.model).items():
        weight = layer.weight().detach() if isinstance(layer, AdaptedLinear) else layer.dequantize()
        assert torch.equal(model.get_submodule(name).weight, weight), name


@pytest.mark.parametrize(
    ("family", "tied", "rotation"), [("llama", True, "none"), ("llama", True, "hadamard"), ("qwen2", False, "hadamard")]
)
def test_trained_and_frozen_layers_share_one_file(
    checkpoint: Any, tmp_path: Path, family: str, tied: bool, rotation: str
) -> None:
    loaded = trained(checkpoint(family, tied), qat=qat(rotation=rotation), storage="int4", select=is_query_or_value)
    export(loaded, section("compressed-tensors", max_shard_gb=1e-5), tmp_path / "out", INFO)
    config = config_of(tmp_path / "out")
    assert config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["tie_word_embeddings"] is (tied and rotation == "none")
    assert relative_difference(loaded.model, reloaded(tmp_path / "out")) <= 1e-5


@pytest.mark.parametrize("storage", ["int8_group", "bf16"])
def test_several_grids_become_several_groups_and_dense_layers_are_ignored(
    checkpoint: Any, tmp_path: Path, storage: str
) -> None:
    loaded = trained(checkpoint(), qat=qat(), storage=storage, select=is_query_or_value)
    report = export(loaded, section("compressed-tensors"), tmp_path / "out", INFO)
    found = config_of(tmp_path / "out")["quantization_config"]
    parsed = QuantizationConfig.model_validate(found)
    widths = sorted(group.weights.num_bits for group in parsed.config_groups.values())  # type: ignore[union-attr]
    packed = [n for n, m in linear_layers(loaded.model).items() if isinstance(m, (AdaptedLinear, AffineBase))]
    if storage == "bf16":
        assert widths == [4] and len(packed) == 4
        assert set(found["ignore"]) == {n for n in linear_layers(loaded.model) if n not in packed} | {"lm_head"}
    else:
        assert widths == [4, 8] and len(packed) == 14
        targets = [target for group in parsed.config_groups.values() for target in group.targets]  # type: ignore[union-attr]
        assert sorted(targets) == sorted(packed)
    assert (found["quant_method"], found["format"], found["quantization_status"]) == (
        "compressed-tensors",
        "pack-quantized",
        "compressed",
    )
    assert any("vLLM" in note for note in report.notes)
    model = reloaded(tmp_path / "out")
    for name, layer in linear_layers(loaded.model).items():
        weight = layer.weight().detach() if isinstance(layer, AdaptedLinear) else layer.dequantize()
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert relative_difference(loaded.model, model) <= 1e-5


@pytest.mark.parametrize("format", ["compressed-tensors", "peft"])
@pytest.mark.parametrize("option", [{"dtype": "float16"}, {"basis": "original"}])
def test_options_of_merged_are_refused_elsewhere(
    checkpoint: Any, tmp_path: Path, format: str, option: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(option))}=.* applies to formats? merged.* only"):
        EXPORTERS[format](trained(checkpoint(), qat=qat()), section(format, **option), tmp_path / "out", INFO)


def test_the_stamp_names_the_grid(checkpoint: Any, tmp_path: Path) -> None:
    export(trained(checkpoint(), qat=qat(8, None)), section("compressed-tensors"), tmp_path / "out", INFO)
    stamp = json.loads((tmp_path / "out" / "qaft_export.json").read_text())
    assert stamp["grids"] == [{"kind": "int", "bits": 8, "group_size": None, "symmetric": True, "inputs": None}]
    assert "grid: int8, one scale per output channel, symmetric" in (tmp_path / "out" / "README.md").read_text()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "3 bits": ({"qat": qat(3)}, "3-bit weights.*4 and 8 bits; export `merged`"),
    "code book": (
        {"qat": QatSection(weights=GridSection(kind="nf4", group_size=32))},
        "NF4 is a code book.*qat.weights.kind",
    ),
    "nothing quantized": ({}, "no layer of this run is on a grid"),
    "nf4 storage": (
        {"qat": qat(), "storage": "nf4", "select": is_query_or_value},
        "second time.*model.storage to int4 or int8_group.*`merged` or `peft`",
    ),
    "two asymmetric grids": (
        {"qat": qat(symmetric=False), "storage": "int8_group", "select": is_query_or_value},
        "zero points.*qat.weights.symmetric",
    ),
    "adapter on its own grid": ({"storage": "int4", "size": 0.01}, "14 of 14.*lose more than 30%.*force: true"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_would_not_be_the_trained_model_is_refused(
    checkpoint: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    loaded = trained(widened(checkpoint, tmp_path) if options.get("storage") == "int4" else checkpoint(), **options)
    with pytest.raises(ExportError, match=message):
        export(loaded, section("compressed-tensors"), tmp_path / "out", INFO)
    assert not (tmp_path / "out").exists()


def widened(checkpoint: Any, tmp_path: Path) -> Path:
    """Storage int4 without a qat section has groups of 128, so every width must be a multiple of it."""
    from tiny_checkpoint import SIZES, write_checkpoint

    old = dict(SIZES)
    SIZES.update(hidden_size=128, intermediate_size=128)
    try:
        return write_checkpoint(tmp_path / "wide")
    finally:
        SIZES.update(old)


def test_an_update_that_was_not_trained_through_the_grid_needs_force_and_is_measured(
    checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = trained(widened(checkpoint, tmp_path), storage="int4", size=0.01)
    report = export(loaded, section("compressed-tensors", force=True), tmp_path / "out", INFO)
    assert any("put onto the grid untrained" in note for note in report.notes)
    assert "what survives requantization" in capsys.readouterr().err
    assert relative_difference(loaded.model, reloaded(tmp_path / "out")) > 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_foreign_storage_is_requantized_with_force_only(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint(), qat=qat(), storage="nf4", select=is_query_or_value)
    export(loaded, section("compressed-tensors", force=True), tmp_path / "out", INFO)
    model = reloaded(tmp_path / "out")
    layer = loaded.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, layer.weight().detach())  # type: ignore[operator]
