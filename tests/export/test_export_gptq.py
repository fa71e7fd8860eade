"""GPTQ checkpoints: field by field against a reading of the format in plain integers, and in GPTQModel where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_export import INFO, relative_difference, section, trained
from torch import Tensor

from qaft.bases.affine import AffineBase
from qaft.errors import ExportError
from qaft.export import EXPORTERS
from qaft.export.gptq_layout import gptq_tensors
from qaft.export.reload import gptq_model, gptq_state
from qaft.export.tensors import linear_layers
from qaft.layers.adapted import AdaptedLinear
from qaft.quant.affine import Affine
from qaft.sections import GridSection, QatSection

export = EXPORTERS["gptq"]


def qat(bits: int = 4, group_size: int | None = 32, **options: Any) -> QatSection:
    return QatSection(weights=GridSection(bits=bits, group_size=group_size, **options))


def is_query_or_value(name: str) -> bool:
    return name.endswith(("q_proj", "v_proj"))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def read_by_hand(parts: dict[str, Tensor], bits: int, format: str) -> Tensor:
    """The weight [O, I] of a layer, one word after the other, by the definition of the format."""
    qweight, qzeros, scales, g_idx = (parts[k] for k in ("qweight", "qzeros", "scales", "g_idx"))
    per_word, mask = 32 // bits, (1 << bits) - 1
    weight = torch.empty(qweight.shape[1], len(g_idx))
    for i, group in enumerate(g_idx.tolist()):
        for o in range(qweight.shape[1]):
            code = (int(qweight[i // per_word, o]) >> (bits * (i % per_word))) & mask
            zero = (int(qzeros[group, o // per_word]) >> (bits * (o % per_word))) & mask
            zero += format == "gptq"
            weight[o, i] = float(scales[group, o]) * (code - zero)
    return weight


def codes_of(parts: dict[str, Tensor], bits: int) -> Tensor:
    """The signed codes [O, I] of a layer."""
    qweight = parts["qweight"]
    rows = [(qweight >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)]
    return (torch.stack(rows, 1).flatten(0, 1).T - (1 << (bits - 1))).to(torch.int8)


def dense_tensors(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The checkpoint as the fresh process of verification reads it."""
    return gptq_state(folder, config_of(folder), dtype)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (8, None)])
def test_the_layout_says_the_same_weight_word_by_word(bits: int, group_size: int | None, symmetric: bool) -> None:
    grid = Affine(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    codes = grid.quantize(torch.randn(24, 32, generator=generator) + 0.5)
    parts, format = gptq_tensors("layer", codes, bits), "gptq" if symmetric else "gptq_v2"
    assert parts["qweight"].shape == (32 * bits // 32, 24)
    assert parts["qzeros"].shape == (codes.scale.shape[1], 24 * bits // 32)
    assert (parts["scales"].dtype, parts["g_idx"].dtype) == (torch.float16, torch.int32)
    assert torch.equal(read_by_hand(parts, bits, format), codes.dequantize(torch.float32))
    assert torch.equal(codes_of(parts, bits), codes.values)


def test_the_zero_points_of_a_symmetric_grid_are_one_less_than_the_middle() -> None:
    for bits, word in ((4, 0x77777777), (8, 0x7F7F7F7F)):
        codes = Affine(bits=bits, group_size=32, scale_dtype=torch.float16).quantize(torch.randn(8, 32))
        assert gptq_tensors("layer", codes, bits)["qzeros"].unique().tolist() == [word]


def test_rows_that_do_not_fill_a_word_of_zero_points_are_read_back() -> None:
    codes = Affine(bits=4, group_size=32, symmetric=False, scale_dtype=torch.float16).quantize(torch.randn(11, 64))
    read = read_by_hand(gptq_tensors("layer", codes, 4), 4, "gptq_v2")
    assert torch.equal(read, codes.dequantize(torch.float32))


def test_a_group_of_zeros_stays_zeros_and_scales_below_fp16_are_refused() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[3, :32] = 0
    grid = Affine(bits=4, group_size=32, scale_dtype=torch.bfloat16)
    parts = gptq_tensors("layer", grid.quantize(weight), 4)
    assert torch.equal(read_by_hand(parts, 4, "gptq"), grid.quantize(weight).dequantize(torch.float32))
    assert (parts["scales"] > 0).all()
    tiny = grid.quantize(weight * 2**-20)
    with pytest.raises(ExportError, match=r"layer: \d+ scales are no numbers of fp16.*model.dtype bfloat16"):
        gptq_tensors("layer", tiny, 4)


@pytest.mark.parametrize(
    ("family", "tied", "grid", "storage", "dtype"),
    [
        ("llama", False, qat(4, 32), "int4", "bfloat16"),
        ("qwen2", True, qat(4, 32, range="mse"), "int4", "float16"),
        ("qwen2", False, qat(8, None), "int8_group", "bfloat16"),
        ("llama", True, qat(4, 32, symmetric=False), "bf16", "bfloat16"),
    ],
    ids=["llama int4", "qwen2 tied mse", "qwen2 int8", "llama asymmetric"],
)
def test_the_file_holds_the_trained_codes_and_its_weights_are_those_of_the_run(
    checkpoint: Any, tmp_path: Path, family: str, tied: bool, grid: QatSection, storage: str, dtype: str
) -> None:
    loaded = trained(checkpoint(family, tied), qat=grid, storage=storage, dtype=dtype, select=is_query_or_value)
    export(loaded, section("gptq", max_shard_gb=1e-5), tmp_path / "out", INFO)
    config = config_of(tmp_path / "out")
    symmetric = grid.weights.symmetric
    assert (config["bits"], config["group_size"]) == (grid.weights.bits, grid.weights.group_size or -1)
    assert (config["sym"], config["checkpoint_format"]) == (symmetric, "gptq" if symmetric else "gptq_v2")
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
    stored: dict[str, Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(path)
    dense = dense_tensors(tmp_path / "out", getattr(torch, dtype))
    for name, layer in linear_layers(loaded.model).items():
        weight = layer.weight().detach() if isinstance(layer, AdaptedLinear) else layer.dequantize()
        assert torch.equal(dense[f"{name}.weight"], weight), name
        codes = layer.quantized() if isinstance(layer, AdaptedLinear) else None
        if isinstance(layer, AffineBase):
            codes = layer.qtensor()
        assert (f"{name}.qweight" in stored) is (codes is not None)
        if codes is not None:
            parts = {suffix: stored[f"{name}.{suffix}"] for suffix in ("qweight", "qzeros", "scales", "g_idx")}
            assert torch.equal(codes_of(parts, config["bits"]), codes.values)
            assert torch.equal(parts["scales"].T.to(codes.scale.dtype), codes.scale)
    places = {"self_attn.q_proj", "self_attn.v_proj"} if storage == "bf16" else None
    assert places is None or set(config["modules_in_block_to_quantize"][0]) == places
    model, info = gptq_model(str(tmp_path / "out"))
    assert not any(info.values())
    assert relative_difference(loaded.model, model.eval()) <= 1e-5


def test_a_fresh_process_gives_the_trained_logits(checkpoint: Any, tmp_path: Path) -> None:
    loaded = trained(checkpoint("qwen2"), qat=qat(), storage="int4", select=is_query_or_value)
    report = export(loaded, section("gptq", verify=True), tmp_path / "out", INFO)
    assert report.difference is not None and report.difference.max_relative <= 1e-5
    assert report.rounding is None


def test_a_trained_model_is_exported_from_its_fused_basis(stories260k: Path, tmp_path: Path) -> None:
    loaded = trained(stories260k, qat=qat(8, None), storage="int8_group", select=is_query_or_value)
    export(loaded, section("gptq"), tmp_path / "out", INFO)
    model, info = gptq_model(str(tmp_path / "out"))
    assert not any(info.values())
    assert relative_difference(loaded.model, model.eval()) <= 1e-5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "code book": (
        {"qat": QatSection(weights=GridSection(kind="nf4", group_size=32))},
        "on no affine grid.*kind to int",
    ),
    "3 bits": ({"qat": qat(3)}, "3-bit weights.*4 and 8 bits; export `merged`"),
    "fp32 scales": ({"qat": qat(), "dtype": "float32"}, "no numbers of fp16.*model.dtype"),
    "two grids": (
        {"qat": qat(), "storage": "int8_group", "select": is_query_or_value},
        "2 grids.*model.storage to int4",
    ),
    "nf4 storage": ({"qat": qat(), "storage": "nf4", "select": is_query_or_value}, "on no affine grid.*int4"),
    "one block": ({"qat": qat(), "select": lambda name: "layers.1." in name}, "layers.0.*every block"),
    "nothing packed": ({}, "no layer of this run is on a grid.*add a qat section"),
    "adapter": ({"storage": "int4", "size": 0.01, "group_size": 32}, "14 of 14.*lose more than 30%.*force: true"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_would_not_be_the_trained_model_is_refused(
    checkpoint: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(trained(checkpoint(), **options), section("gptq"), tmp_path / "out", INFO)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_put_onto_its_packed_base_with_force_and_measured(
    checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = trained(checkpoint(), storage="int4", size=0.01, group_size=32)
    report = export(loaded, section("gptq", force=True), tmp_path / "out", INFO)
    assert any("put onto the grid untrained" in note for note in report.notes)
    assert "what survives requantization" in capsys.readouterr().err


def test_gptqmodel_reads_the_trained_weights(checkpoint: Any, tmp_path: Path) -> None:
    """Runs where GPTQModel is: it asks for another torch than this project's."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    from transformers import AutoModelForCausalLM, GPTQConfig

    loaded = trained(checkpoint(), qat=qat(), storage="int4", select=is_query_or_value)
    export(loaded, section("gptq"), tmp_path / "out", INFO)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, quantization_config=GPTQConfig(bits=4, backend="gptq_torch")
    )
    assert not any(info.values())
    dense = dense_tensors(tmp_path / "out", torch.float16)
    with torch.compiler.set_stance("force_eager"):
        for name in linear_layers(loaded.model):
            assert torch.equal(model.get_submodule(name).dequantize_weight().T, dense[f"{name}.weight"]), name
