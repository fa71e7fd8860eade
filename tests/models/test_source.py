"""Opening checkpoints: every kind of source, and what is said about those that cannot be opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qaft.errors import ModelError
from qaft.models import hub
from qaft.models.source import load_tokenizer, open_source

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
def test_tensors_are_those_of_the_files(write_checkpoint: Callable[..., Path], shard_size: str) -> None:
    folder = write_checkpoint(shard_size=shard_size)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 2) == (shard_size == "40KB")
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    source = open_source(str(folder))
    assert set(source.names()) == stored.keys()
    assert all(torch.equal(source.read(name), tensor) for name, tensor in stored.items())
    assert source.quantized_from is None and not source.tied
    assert load_tokenizer(source)("w3 w5")["input_ids"] == [3, 5]


def test_a_tensor_read_survives_its_file(write_checkpoint: Callable[..., Path]) -> None:
    folder = write_checkpoint()
    expected = load_file(folder / WEIGHTS)["model.norm.weight"].clone()
    tensor = open_source(str(folder)).read("model.norm.weight")
    (folder / WEIGHTS).write_bytes(b"")
    assert torch.equal(tensor, expected)


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def _edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def _truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _run_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "qaft.yaml").write_text("{}")


def _adapter(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (_without("config.json"), "no config.json"),
    "no weights": (_without(WEIGHTS), r"no model\.safetensors and no .*found: none"),
    "truncated": (_truncate, "not a complete safetensors file, .* download it again"),
    "git-lfs pointer": (_write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid x\n"), "git lfs pull"),
    "pickle": (_pickle, r"python -c .*save_pretrained"),
    "adapter": (_adapter, "adapter without its base model"),
    "run folder": (_run_folder, "a run folder"),
    "index without shards": (
        _write("model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'),
        "model-00001-of-00001.safetensors of .* missing",
    ),
    "broken index": (_write("model.safetensors.index.json", "{"), "not a readable index"),
    "unknown model": (_edit_config(model_type="nonesuch"), "does not know this model"),
    "encoder": (_edit_config(model_type="t5", architectures=["T5Model"]), "no causal language model"),
    "other head": (_edit_config(architectures=["LlamaForSequenceClassification"]), "no causal language model"),
    "other quantization": (_edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), "16-bit checkpoint"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_checkpoint_is_explained(
    write_checkpoint: Callable[..., Path], damage: Callable[[Path], object], message: str
) -> None:
    folder = write_checkpoint()
    damage(folder)
    with pytest.raises(ModelError, match=message):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("nowhere.gguf", "no such file"),
        ("not a name!", "neither a local path nor a hub id"),
        ("nobody/nothing", "no such local folder, and the hub does not give it"),
    ],
)
def test_a_name_that_is_nothing_is_explained(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_source(name)


def test_a_weight_file_is_not_a_checkpoint(write_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="give the folder"):
        open_source(str(write_checkpoint() / WEIGHTS))


def test_a_missing_tensor_is_named(write_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"no tensor model\.nothing"):
        open_source(str(write_checkpoint())).read("model.nothing")


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_a_checkpoint_without_tokenizer_is_explained(write_checkpoint: Callable[..., Path], damage: str) -> None:
    folder = write_checkpoint()
    if damage == "missing":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="no tokenizer" if damage == "missing" else "tokenizer cannot be read"):
        load_tokenizer(open_source(str(folder)))


@pytest.fixture
def hub_cache(tmp_path: Path, write_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache as a download leaves it, with the repository ``org/tiny``."""
    commit = "0123456789" * 4
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(write_checkpoint(shard_size="40KB"), repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "snapshots" / commit


def test_a_hub_id_is_read_from_the_cache_without_network(hub_cache: Path) -> None:
    source = open_source("org/tiny")
    assert source.folder == hub_cache and source.name == "org/tiny"
    assert source.read("model.norm.weight").shape == (64,)


def test_only_the_weights_of_the_index_are_downloaded(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(hub_cache)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    open_source("org/tiny", revision="main")
    assert asked[1] == sorted(file.name for file in hub_cache.glob("*.safetensors"))
    assert not any("safetensors" in pattern or ".py" in pattern for pattern in asked[0])


BITSANDBYTES = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 double": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.parametrize(("name", "config"), BITSANDBYTES.items(), ids=BITSANDBYTES.keys())
def test_bitsandbytes_checkpoints_are_dequantized_when_read(
    write_checkpoint: Callable[..., Path], tmp_path: Path, name: str, config: BitsAndBytesConfig
) -> None:
    plain = write_checkpoint()
    packed = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
    packed.save_pretrained(tmp_path / "packed")
    source, original = open_source(str(tmp_path / "packed")), open_source(str(plain))
    assert source.quantized_from == name.split()[0]
    assert set(source.names()) == set(original.names())
    assert not hasattr(source.config, "quantization_config")
    layer = "model.layers.0.mlp.up_proj"
    weight = source.read(f"{layer}.weight")
    torch.testing.assert_close(weight, _dequantized(packed.get_submodule(layer)), rtol=3e-7, atol=0)
    error = (weight - original.read(f"{layer}.weight")).norm() / weight.norm()
    assert 0.001 < error < 0.2
    assert torch.equal(source.read("model.norm.weight"), original.read("model.norm.weight"))


def _dequantized(module: torch.nn.Module) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    parameter = module.weight
    if hasattr(parameter, "quant_state"):
        return bnb.dequantize_4bit(parameter.data, parameter.quant_state)  # type: ignore[arg-type]
    return bnb.int8_vectorwise_dequant(parameter.data, parameter.SCB)  # type: ignore[arg-type]


def test_a_weight_without_its_scales_is_refused(write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        write_checkpoint(), quantization_config=BITSANDBYTES["nf4"], dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / WEIGHTS)
    layer = "model.layers.0.mlp.up_proj.weight"
    del tensors[f"{layer}.absmax"]
    save_file(tensors, tmp_path / "packed" / WEIGHTS)
    with pytest.raises(ModelError, match=r"up_proj\.weight: absmax of a 4-bit weight is missing"):
        open_source(str(tmp_path / "packed")).read(layer)
