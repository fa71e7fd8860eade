"""Measured errors are those of models that are really in that basis."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import write_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qaft.arch import arch_of
from qaft.models.layerwise import LayerwiseModel
from qaft.models.measure import Grids, measure_rotations
from qaft.models.source import open_source
from qaft.quant import Affine
from qaft.quant.activation import TokenQuantizer
from qaft.quant.kv import RosteKV
from qaft.rotation.choice import Choice
from qaft.rotation.choose import LayerErrors
from qaft.rotation.errors import linear_errors, output_energy, vector_error
from qaft.rotation.fuse import Fusion, fuse_model
from qaft.rotation.places import attention_rotation

IDS = torch.arange(24).reshape(2, 12) * 7 % 61
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": {"head_dim": 16},
    "gpt_neox": {"num_key_value_heads": 4},
    "opt": {"enable_bias": False, "num_key_value_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
EVERYTHING = Choice.uniform(2, residual=True, values=True, attention=True, down=True)
WEIGHTS, INPUTS, CACHE = Affine(bits=4, group_size=32), TokenQuantizer(bits=4), RosteKV(bits=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    written: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in written:
            place = tmp_path_factory.mktemp(family)
            written[family] = write_checkpoint(place, family=family, dtype=torch.float32, **OPTIONS[family])
        return written[family]

    return make


def measured(path: Path, available: Choice = EVERYTHING, real: Tensor | None = None, **grids: Any) -> list[LayerErrors]:
    source = open_source(str(path))
    arch = arch_of(source.config)
    return measure_rotations(
        LayerwiseModel(source, arch, device=torch.device("cpu")),
        arch,
        {"input_ids": IDS, "use_cache": False},
        torch.ones(2, 12, dtype=torch.bool) if real is None else real,
        Grids(**{"weights": lambda name: WEIGHTS, "inputs": INPUTS, **grids}),
        available,
    )


def captured(model: Any) -> dict[str, Tensor]:
    """The inputs of every linear of the blocks, [tokens, I]."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args: found.__setitem__(name, args[0].flatten(0, -2))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(IDS, use_cache=False)
    return found


@pytest.mark.parametrize("bits", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("family", OPTIONS)
def test_the_errors_are_those_of_the_fused_model(
    folder: Callable[[str], Path], family: str, bits: tuple[bool, bool]
) -> None:
    path = folder(family)
    plain = AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)
    arch = arch_of(plain.config)
    fused = copy.deepcopy(plain)
    fusion = Fusion(arch, Choice.uniform(2, residual=bits[0], values=bits[1]))
    fuse_model(fused, fusion)
    original, rotated = captured(plain), captured(fused)
    choice = Choice.uniform(2, residual=bits[0], values=bits[1], down=bits[1])
    with_down = Fusion(arch, choice)
    state = plain.state_dict()
    for layer in measured(path):
        for name, met in layer.beside.items():
            if bits[1] and not met:
                assert bits not in layer.linears[name]
                continue
            x, weight = rotated[name], fused.get_submodule(name).weight
            if met == "down" and bits[1]:
                weight = with_down.forward(f"{name}.weight", state[f"{name}.weight"], state)
                if name.endswith(("down_proj", "dense_4h_to_h", "fc2")):
                    place = with_down.places[name].reads
                    assert place is not None
                    # The fused model above has no signs in up: they and the online part are those of the whole place.
                    x = place.apply(original[name])
            energy = output_energy(original[name], plain.get_submodule(name).weight)
            expected = linear_errors(x, weight, weights=WEIGHTS, inputs=INPUTS, energy=energy)
            found = layer.linears[name][bits]
            # fp32 sums in another order can move a value across a rounding boundary.
            assert found.delta_y == pytest.approx(expected.delta_y, rel=0.05), name
            assert found.delta_w == pytest.approx(expected.delta_w, rel=0.02), name
            assert found.crest_x == pytest.approx(expected.crest_x, rel=1e-3), name


def test_inputs_of_layers_that_read_16_bits_have_no_error(folder: Callable[[str], Path]) -> None:
    layers = measured(folder("llama"), reads_integers=lambda name: name.endswith("q_proj"))
    errors = {name: found for layer in layers for name, bits in layer.linears.items() for found in bits.values()}
    assert all((found.delta_x > 0) is name.endswith("q_proj") for name, found in errors.items())


def test_the_errors_of_the_cache_are_those_of_keys_and_values(folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    arch = arch_of(plain.config)
    fusion = Fusion(arch, Choice.uniform(2, residual=False, values=True))
    with torch.no_grad():
        cache = plain(IDS, use_cache=True).past_key_values
    r3 = attention_rotation(arch, rotation="hadamard")
    for i, layer in enumerate(measured(path, cache=CACHE)):
        keys, values = cache.layers[i].keys, cache.layers[i].values
        side = fusion.places[f"model.layers.{i}.self_attn.v_proj"].writes
        assert side is not None and layer.keys is not None and layer.values is not None
        assert layer.keys == pytest.approx((vector_error(keys, CACHE), vector_error(r3(keys), CACHE)), rel=1e-2)
        rotated = vector_error(side.rotation(values), CACHE)
        assert layer.values == pytest.approx((vector_error(values, CACHE), rotated), rel=1e-2)


def test_padding_is_not_measured(folder: Callable[[str], Path]) -> None:
    real = torch.zeros(2, 12, dtype=torch.bool)
    real[1, :5] = True
    seen: list[int] = []

    def count(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    measured(folder("llama"), real=real, inputs=count)
    assert set(seen) == {5}


def test_layers_in_16_bits_have_no_error(folder: Callable[[str], Path]) -> None:
    layers = measured(folder("llama"), weights=lambda name: WEIGHTS if name.endswith("v_proj") else None)
    for layer in layers:
        for name, errors in layer.linears.items():
            assert all((e.delta_y > 0) == name.endswith("v_proj") for e in errors.values())


def test_rotations_that_are_not_available_are_not_measured(folder: Callable[[str], Path]) -> None:
    layers = measured(folder("llama"), Choice.uniform(2, residual=False, values=True), cache=CACHE)
    for layer in layers:
        assert set(layer.beside.values()) == {"", "values"}
        assert {bits for errors in layer.linears.values() for bits in errors} == {(False, False), (False, True)}
        assert layer.keys is not None and layer.keys[0] == layer.keys[1]


def test_outlier_channels_favour_the_rotation_of_the_stream(tmp_path: Path) -> None:
    from qaft.rotation.choose import choose

    path = write_checkpoint(tmp_path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] *= 60
    model.save_pretrained(path)
    layers = measured(path)
    assert choose(layers, EVERYTHING).residual
    query = layers[0].linears["model.layers.0.self_attn.q_proj"]
    assert query[False, False].crest_x > 1.5 * query[True, False].crest_x
    assert query[False, False].delta_x > 4 * query[True, False].delta_x
