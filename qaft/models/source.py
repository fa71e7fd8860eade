"""A checkpoint as names and tensors, whatever it is stored as: hub id, folder, GGUF file, bitsandbytes weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qaft.errors import ModelError
from qaft.models.gguf import convert_gguf
from qaft.models.hub import download
from qaft.models.shards import locate_tensors, read_tensor
from qaft.recipe import RUN_RECIPE
from qaft.sections import ModelSection

_FOUR_BIT_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_FOUR_BIT_STATE = "quant_state.bitsandbytes__"
_INT8_PARTS = ("SCB", "weight_format")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """An opened checkpoint; tensors are read one at a time, when they are asked for.

    Attributes:
        name: what the user called it.
        folder: where config, weights and tokenizer lie.
        config: its configuration, without a section on quantization.
        files: stored tensor name -> file.
        quantized_from: ``nf4``, ``fp4``, ``int8`` or ``gguf`` when the weights were on such a grid before, else None.
        trust_remote_code: whether Python code beside the weights may run.
    """

    name: str
    folder: Path
    config: PretrainedConfig
    files: Mapping[str, Path]
    quantized_from: str | None = None
    trust_remote_code: bool = False

    @property
    def tied(self) -> bool:
        """Return whether the config says that head and embedding share one weight."""
        return bool(getattr(self.config.get_text_config(), "tie_word_embeddings", False))

    def names(self) -> tuple[str, ...]:
        """Return the names of the parameters, in the order of the files."""
        parts = {stored for parts in self._packed.values() for stored in parts.values()}
        return tuple(name for name in self.files if name not in parts)

    def read(self, name: str) -> Tensor:
        """Return one parameter in memory of its own, in the dtype of the checkpoint; fp32 when it was packed.

        Raises:
            ModelError: the checkpoint has no such parameter, or cannot be read.
        """
        if name not in self.files:
            raise ModelError(f"{self.name}: the checkpoint has no tensor {name}")
        weight = read_tensor(self.files[name], name)
        if name not in self._packed:
            return weight
        from qaft.bases.bnb import dequantize_stored

        parts = {part: read_tensor(self.files[stored], stored) for part, stored in self._packed[name].items()}
        try:
            return dequantize_stored({"weight": weight, **parts})
        except ValueError as error:
            raise ModelError(f"{self.name}: {name}: {error}") from error

    @cached_property
    def _packed(self) -> dict[str, dict[str, str]]:
        return _packed_weights(self.files)


def _packed_weights(names: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Return weight name -> {part: stored name} for the weights that bitsandbytes stores in several tensors."""
    packed: dict[str, dict[str, str]] = {}
    for stored in names:
        module, dot, part = stored.partition(".weight.")
        if dot and (part in _FOUR_BIT_PARTS or part.startswith(_FOUR_BIT_STATE)):
            packed.setdefault(f"{module}.weight", {})[part] = stored
        module, _, part = stored.rpartition(".")
        if part in _INT8_PARTS and f"{module}.weight" in names:
            packed.setdefault(f"{module}.weight", {})[part] = stored
    return packed


def source_of(section: ModelSection) -> CheckpointSource:
    """Return the checkpoint that a recipe names.

    Raises:
        ModelError: see ``open_source``.
    """
    return open_source(
        section.name,
        revision=section.revision,
        dtype=getattr(torch, section.dtype),
        trust_remote_code=section.trust_remote_code,
    )


def config_of(section: ModelSection) -> PretrainedConfig:
    """Return the configuration of the checkpoint that a recipe names, whether or not its weights are there.

    Raises:
        ModelError: there is no such checkpoint, or it is no causal language model.
    """
    name, code = section.name, section.trust_remote_code
    dtype = getattr(torch, section.dtype)
    folder = _folder_of(name, revision=section.revision, dtype=dtype, code=code, weights=False)
    config = _read_config(name, folder, code)
    _require_causal_lm(name, config, code)
    _take_quantization(name, config)
    return config


def open_source(
    name: str, *, revision: str | None = None, dtype: torch.dtype = torch.bfloat16, trust_remote_code: bool = False
) -> CheckpointSource:
    """Return the checkpoint that ``name`` means; no weight is read yet (a GGUF file is converted on first use).

    Args:
        name: local folder, ``.gguf`` file, or hub id.
        revision: hub only: branch, tag or commit.
        dtype: GGUF only: the precision of the dequantized weights.
        trust_remote_code: run Python code that the checkpoint ships.

    Raises:
        ModelError: there is no such checkpoint, a file is missing or broken, or it is no causal language model.
    """
    folder = _folder_of(name, revision=revision, dtype=dtype, code=trust_remote_code)
    config = _read_config(name, folder, trust_remote_code)
    _require_causal_lm(name, config, trust_remote_code)
    files = locate_tensors(folder)
    declared = _take_quantization(name, config)
    return CheckpointSource(
        name=name,
        folder=folder,
        config=config,
        files=files,
        quantized_from="gguf" if name.endswith(".gguf") else declared,
        trust_remote_code=trust_remote_code,
    )


def load_tokenizer(source: CheckpointSource) -> PreTrainedTokenizerBase:
    """Return the checkpoint's tokenizer.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    # Without any of these files some tokenizer classes come up with an empty vocabulary instead of an error.
    if not source.trust_remote_code and not any((source.folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"{source.folder}: no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); copy the tokenizer files of the "
            "model that this checkpoint was trained from into the folder"
        )
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # tokenizer readers raise anything, plain Exception included
        raise ModelError(f"{source.folder}: the tokenizer cannot be read ({type(error).__name__}: {error})") from error


def _folder_of(name: str, *, revision: str | None, dtype: torch.dtype, code: bool, weights: bool = True) -> Path:
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{name}: no such file")
        return convert_gguf(path, dtype)
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"{name}: a file; give the folder that holds config.json and the weights, or a .gguf file")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"{name}: no such folder")
    return download(name, revision=revision, code=code, weights=weights)


def _read_config(name: str, folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        if (folder / RUN_RECIPE).is_file():
            raise ModelError(f"{name}: a run folder, not a checkpoint; give the model it started from, or export it")
        raise ModelError(f"{name}: no config.json, so no model; give the folder that `save_pretrained` wrote")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder / 'config.json'}: transformers does not know this model: {str(error).splitlines()[0]}; update "
            "transformers, or set model.trust_remote_code if the checkpoint ships code that you trust"
        ) from error


def _require_causal_lm(name: str, config: PretrainedConfig, trust_remote_code: bool) -> None:
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) and trust_remote_code:
        return
    architectures = config.architectures or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (not architectures or known & set(architectures)):
        return
    raise ModelError(
        f"{name}: model_type={config.model_type!r}, architectures={architectures} is no causal language model; give a "
        "checkpoint of a decoder, such as LlamaForCausalLM"
    )


def _take_quantization(name: str, config: PretrainedConfig) -> str | None:
    """Remove the quantization section from the config and return what it declares: nf4, fp4, int8 or None."""
    section: Any = getattr(config, "quantization_config", None)
    if section is None:
        return None
    section = section if isinstance(section, dict) else section.to_dict()
    method = str(section.get("quant_method", "")).rsplit(".", 1)[-1].lower()
    if "bitsandbytes" not in method and not section.get("load_in_4bit") and not section.get("load_in_8bit"):
        raise ModelError(
            f"{name}: weights quantized by {method or 'an unnamed method'} cannot be read; give the 16-bit checkpoint "
            "that they were made from (bitsandbytes and GGUF are read)"
        )
    delattr(config, "quantization_config")
    return "int8" if section.get("load_in_8bit") else str(section.get("bnb_4bit_quant_type", "fp4"))
