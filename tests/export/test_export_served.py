"""Exports with quantized inputs and online rotations: what the file holds, and what its readers compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.transform import TransformConfig, TransformFactory, apply_transform_config
from safetensors.torch import load_file
from tiny_export import INFO, prompts, relative_difference, reloaded, section
from tiny_served import SCHEMES, served
from torch import nn
from transformers import AutoModelForCausalLM

from qaft.bases.affine import AffineBase
from qaft.errors import DifferenceError, ExportError
from qaft.evaluate.float32 import float_logits
from qaft.export import EXPORTERS
from qaft.export.base import FLIPPING
from qaft.export.sites import code_flips, input_codes, input_sites, record_inputs
from qaft.export.tensors import linear_layers
from qaft.export.transform_config import online_rotation
from qaft.layers.adapted import AdaptedLinear
from qaft.layers.inputs import input_of
from qaft.models.plain import load_plain
from qaft.quant import TokenQuantizer, VllmKV
from qaft.rotation.blocks import BlockDiagonal
from qaft.rotation.hadamard import Hadamard

export = EXPORTERS["compressed-tensors"]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def assert_codes_are_in_the_file(loaded: Any, folder: Path) -> None:
    stored, scheme = load_file(folder / "model.safetensors"), config_of(folder)["config_groups"]["group_0"]
    for name, layer in linear_layers(loaded.model).items():
        codes = layer.quantized() if isinstance(layer, AdaptedLinear) else layer.qtensor()
        assert codes is not None
        if scheme["format"] == "int-quantized":
            assert torch.equal(stored[f"{name}.weight"], codes.values)
            assert stored[f"{name}.weight"].dtype == torch.int8
        else:
            shape = torch.Size(stored[f"{name}.weight_shape"].tolist())
            unpacked = unpack_from_int32(stored[f"{name}.weight_packed"], scheme["weights"]["num_bits"], shape)
            assert torch.equal(unpacked, codes.values)
        assert torch.equal(stored[f"{name}.weight_scale"], codes.scale)


@pytest.mark.parametrize("profile", ["portable", "vllm"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_holds_the_trained_codes_and_says_how_inputs_are_quantized(
    checkpoint: Any, tmp_path: Path, scheme: str, profile: str
) -> None:
    loaded = served(checkpoint(), scheme, profile=profile, storage="int4" if scheme == "W4A8" else "bf16")
    export(loaded, section("compressed-tensors", profile=profile), tmp_path / "out", INFO)
    assert_codes_are_in_the_file(loaded, tmp_path / "out")
    found = config_of(tmp_path / "out")
    (group,) = QuantizationConfig.model_validate(found).config_groups.values()
    bits, group_size, inputs = SCHEMES[scheme]
    assert (group.weights.num_bits, group.weights.group_size) == (bits, group_size)  # type: ignore[union-attr]
    expected = None if inputs is None else (inputs, "int", True, "token", True)
    args = group.input_activations  # type: ignore[union-attr]
    assert expected == (args and (args.num_bits, args.type, args.symmetric, args.strategy, args.dynamic))
    assert found["format"] == ("int-quantized" if scheme == "W8A8" else "pack-quantized") == group.format  # type: ignore[union-attr]
    assert ("transform_config" in found) is (profile == "vllm")
    model = load_plain(str(tmp_path / "out"))[0]
    assert relative_difference(loaded.model, model) <= 1e-5


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8", "W4A4"])
def test_transformers_itself_runs_the_function_of_compressed_tensors(
    checkpoint: Any, tmp_path: Path, scheme: str
) -> None:
    loaded = served(checkpoint(), scheme, function="compressed-tensors")
    export(loaded, section("compressed-tensors"), tmp_path / "out", INFO)
    model = reloaded(tmp_path / "out")
    assert relative_difference(loaded.model, model) == 0
    inputs = record_inputs(loaded.model, prompts()[0])
    assert len(inputs) == 14 and input_sites(model).keys() == inputs.keys()
    assert set(code_flips(input_codes(loaded.model, inputs), input_codes(model, inputs)).values()) == {0.0}


@pytest.mark.parametrize("scheme", ["W8A8", "W4A4"])
def test_transformers_itself_runs_another_function_than_the_kernels_of_vllm(
    checkpoint: Any, tmp_path: Path, scheme: str
) -> None:
    loaded = served(checkpoint(), scheme)
    export(loaded, section("compressed-tensors"), tmp_path / "out", INFO)
    inputs = record_inputs(loaded.model, prompts()[0])
    codes = input_codes(loaded.model, inputs)
    flips = code_flips(codes, input_codes(reloaded(tmp_path / "out"), inputs))
    assert min(flips.values()) > 0.02 and max(flips.values()) < 0.3
    with pytest.raises(DifferenceError, match=r"quantizes inputs of model\.layers\..*allowed 1%"):
        FLIPPING.check_codes(flips)
    same = code_flips(codes, input_codes(load_plain(str(tmp_path / "out"))[0], inputs))
    assert set(same.values()) == {0.0}


@pytest.mark.parametrize("rotated", [(0, 1), (1,)], ids=["all layers", "one layer"])
def test_the_transform_of_the_library_is_our_online_rotation(
    checkpoint: Any, tmp_path: Path, rotated: tuple[int, ...]
) -> None:
    loaded = served(checkpoint(), "W4A8", profile="vllm", down=lambda layer: layer in rotated)
    export(loaded, section("compressed-tensors", profile="vllm"), tmp_path / "out", INFO)
    config = TransformConfig.model_validate(config_of(tmp_path / "out")["transform_config"])
    (scheme,) = config.config_groups.values()
    assert (scheme.type, scheme.head_dim, [a.location for a in scheme.apply]) == ("hadamard", 32, ["input"])
    names = [f"model.layers.{i}.mlp.down_proj" for i in rotated]
    assert scheme.apply[0].targets == (names if len(rotated) == 1 else [r"re:.*\.down_proj$"])
    model = reloaded(tmp_path / "out")
    for module in model.modules():
        module.quantization_enabled = False
    wrong = relative_difference(loaded.model, model)
    apply_transform_config(model, config)
    for name, module in model.named_modules():
        rotation = online_rotation(loaded.model.get_submodule(name)) if isinstance(module, nn.Linear) else None
        assert hasattr(module, "R4_input") is (rotation is not None) is (name in names)
        if rotation is not None:
            x = torch.randn(3, module.in_features)
            torch.testing.assert_close(module.R4_input(x), rotation(x), rtol=1e-6, atol=1e-6)
    put_trained_quantizers(loaded.model, model)
    assert relative_difference(loaded.model, model) <= 1e-2 < wrong


def put_trained_quantizers(live: nn.Module, model: nn.Module) -> None:
    """Quantize inputs as the live model does, behind the library's transforms."""
    for name in input_sites(live):
        quantizer = input_of(live.get_submodule(name)).quantizer  # type: ignore[union-attr]
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, q=quantizer: (q(args[0]),))


@pytest.mark.parametrize("size", [4, 32, 512, 2048])
def test_a_block_of_the_library_is_ours_at_every_width(size: int) -> None:
    scheme = TransformConfig.model_validate(
        {
            "config_groups": {
                "R4": {"type": "hadamard", "head_dim": size, "apply": [{"targets": ["x"], "location": "input"}]}
            }
        }
    ).config_groups["R4"]
    layer = nn.Linear(3 * size, 2, bias=False)
    transform = TransformFactory.from_scheme(scheme, name="R4").create_transform(layer, scheme.apply[0])
    x = torch.randn(5, 3 * size)
    torch.testing.assert_close(transform(x), BlockDiagonal(3 * size, Hadamard(size))(x), rtol=1e-6, atol=2e-6)


FRESH: dict[str, dict[str, Any]] = {
    "W8A8 portable": {"scheme": "W8A8"},
    "W4A4 vllm": {"scheme": "W4A4", "profile": "vllm"},
    "W4A8 portable, of compressed-tensors": {"scheme": "W4A8", "function": "compressed-tensors"},
}


@pytest.mark.parametrize("options", FRESH.values(), ids=FRESH)
def test_a_fresh_process_runs_the_trained_function(checkpoint: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    loaded = served(checkpoint(), **options, cache=VllmKV(head_dim=16))
    chosen = section("compressed-tensors", verify=True, profile=options.get("profile", "portable"))
    report = export(loaded, chosen, tmp_path / "out", INFO)
    assert report.difference is not None and report.difference.max_relative <= 1e-5
    notes = "\n".join(report.notes)
    assert "codes of inputs that differ: at most 0.00%" in notes and "in 16 bits: KL" in notes
    assert "--kv-cache-dtype int4_per_token_head" in notes
    assert ("transformers with compressed-tensors divides" in notes) is (options == {"scheme": "W8A8"})
    assert ("--linear-backend humming" in notes) is (options["scheme"] != "W8A8")
    assert ("transformers ignores transform_config" in notes) is ("profile" in options)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("vllm serve out" in card) is ("profile" in options)


@pytest.mark.parametrize("profile", ["portable", "vllm"])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "W8A8 in groups"])
def test_a_real_model_is_exported_in_every_scheme(stories260k: Path, tmp_path: Path, scheme: str, profile: str) -> None:
    loaded = served(stories260k, scheme, profile=profile, per_channel=True, dtype="float32")
    export(loaded, section("compressed-tensors", profile=profile), tmp_path / "out", INFO)
    assert_codes_are_in_the_file(loaded, tmp_path / "out")
    assert relative_difference(loaded.model, load_plain(str(tmp_path / "out"))[0]) <= 1e-5


def test_inputs_of_code_books_stay_in_16_bits_and_the_file_says_so(checkpoint: Any, tmp_path: Path) -> None:
    def q_or_v(name: str) -> bool:
        return name.endswith(("q_proj", "v_proj"))

    loaded = served(checkpoint(), "W4A8", storage="nf4", select=q_or_v)
    sites = {name for name in linear_layers(loaded.model) if q_or_v(name)}
    assert input_sites(loaded.model).keys() == sites
    export(loaded, section("compressed-tensors", force=True), tmp_path / "out", INFO)
    groups = config_of(tmp_path / "out")["config_groups"].values()
    quantized = {target for group in groups if group["input_activations"] for target in group["targets"]}
    assert quantized == sites == input_sites(load_plain(str(tmp_path / "out"))[0]).keys()


@pytest.mark.parametrize("storage", ["int4", "int8_group"])
def test_inputs_of_frozen_integers_are_quantized_as_the_file_says(
    checkpoint: Any, tmp_path: Path, storage: str
) -> None:
    loaded = served(checkpoint(), "W4A8", storage=storage, select=lambda name: name.endswith("q_proj"))
    layers = linear_layers(loaded.model)
    assert input_sites(loaded.model).keys() == layers.keys()
    assert sum(isinstance(layer, AffineBase) for layer in layers.values()) == 12
    export(loaded, section("compressed-tensors"), tmp_path / "out", INFO)
    model = load_plain(str(tmp_path / "out"))[0]
    assert input_sites(model).keys() == layers.keys()
    assert relative_difference(loaded.model, model) <= 1e-5


def test_a_folder_with_transforms_is_another_function_in_transformers_and_the_trained_one_here(
    checkpoint: Any, tmp_path: Path
) -> None:
    loaded = served(checkpoint(), "W4A8", profile="vllm")
    export(loaded, section("compressed-tensors", profile="vllm"), tmp_path / "out", INFO)
    assert relative_difference(loaded.model, reloaded(tmp_path / "out")) > 0.1
    assert relative_difference(loaded.model, load_plain(str(tmp_path / "out"))[0]) <= 1e-5


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "asymmetric inputs": (TokenQuantizer(bits=8, symmetric=False), {}, "symmetric: true and clip: 1"),
    "clipped inputs": (TokenQuantizer(bits=8, clip=0.9), {}, "symmetric: true and clip: 1"),
    "rotation in a portable folder": (TokenQuantizer(bits=8), {"profile": "vllm"}, "export.profile to vllm"),
}


@pytest.mark.parametrize(("quantizer", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_reader_would_compute_is_refused(
    checkpoint: Any, tmp_path: Path, quantizer: TokenQuantizer, options: dict[str, Any], message: str
) -> None:
    loaded = served(checkpoint(), "W4A8", **options)
    for name in input_sites(loaded.model):
        input_of(loaded.model.get_submodule(name)).quantizer = quantizer  # type: ignore[union-attr]
    with pytest.raises(ExportError, match=message):
        export(loaded, section("compressed-tensors"), tmp_path / "out", INFO)
    assert not (tmp_path / "out").exists()


def test_a_quantizer_that_the_reload_lacks_is_found(checkpoint: Any) -> None:
    loaded = served(checkpoint(), "W4A8")
    inputs = record_inputs(loaded.model, prompts()[0])
    codes = input_codes(loaded.model, inputs)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint())
    assert set(code_flips(codes, input_codes(plain, inputs)).values()) == {1.0}
    assert float_logits(loaded.model, prompts())
