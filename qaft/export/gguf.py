"""``gguf``: one file for llama.cpp, with the trained codes and scales in its block types.

    grid q4_0, q8_0, mxfp4     the type of that name
    grid int, no zero point    Q4_0 (up to 4 bits) or Q8_0, where groups are multiples of 32 and scales are fp16 numbers
    everything else            F16, BF16 or F32: the dtype of the model, or ``dtype``; vectors always in F32

The folder holds ``model.gguf`` and, for readers that want them, the files of transformers without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
    quant_shape_to_byte_shape,
)
from torch import Tensor

from qaft.arch import arch_of
from qaft.bases.affine import AffineBase
from qaft.errors import ExportError
from qaft.export.base import EXACT, ExportInfo, ExportReport, Linear, Written
from qaft.export.checkpoint_writer import to_dtype
from qaft.export.gguf_blocks import PLAIN_TYPES, packed_blocks, plain_bytes, type_of_base, type_of_grid
from qaft.export.gguf_families import GgufFamily, add_hyperparameters, gguf_family, rope_factors, row_order
from qaft.export.gguf_tokenizer import add_tokenizer
from qaft.export.hf_files import write_hf_files
from qaft.export.publish import publish
from qaft.export.tensors import (
    is_exact,
    is_tied,
    linear_layers,
    merged_weight,
    model_dtype,
    model_parts,
    require_plain_options,
    require_portable,
)
from qaft.layers.adapted import AdaptedLinear
from qaft.quant.base import QTensor

if TYPE_CHECKING:
    from qaft.models.load import LoadedModel
    from qaft.sections import ExportSection

FILE = "model.gguf"

_FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.MXFP4: LlamaFileType.MOSTLY_MXFP4_MOE,
}

_ROTARY_TABLE = "rotary_emb.inv_freq"
"""Early Llama checkpoints store it in every layer; it follows from the hyperparameters."""

_BITS = {GGMLQuantizationType.Q4_0: 4, GGMLQuantizationType.Q8_0: 8, GGMLQuantizationType.MXFP4: 4}


@dataclass
class _Plan:
    """How each linear layer is written: ``codes`` of packed layers, of ``types``; all others are plain."""

    dtype: torch.dtype
    types: dict[str, GGMLQuantizationType] = field(default_factory=dict)
    codes: dict[str, Callable[[], QTensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: name, shape, type, and its bytes, which are made when they are written."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    data: Callable[[], np.ndarray]


def export_gguf(loaded: LoadedModel, section: ExportSection, folder: Path, info: ExportInfo) -> ExportReport:
    """One GGUF file with tokenizer and chat template, for llama.cpp and what is built on it.

    Raises:
        ExportError: see ``Exporter``; or GGUF has no type for a grid, llama.cpp no such family or tokenizer.
        RecipeError: an option that only other formats have.
        DifferenceError: the reload differs by more than its bound.
    """
    require_plain_options(section)
    layers = linear_layers(loaded.model)
    require_portable(layers)
    family = gguf_family(loaded.model.config)
    if family.always_tied and not is_tied(loaded.model):
        raise ExportError(
            f"model_type={loaded.model.config.model_type!r}: llama.cpp takes its embedding for the head, and this "
            "model has a head of its own; export `merged`"
        )
    plan = _plan(loaded, layers, section)
    return publish(loaded, section, folder, info, write=partial(_write, loaded, family, plan, info))


def _plan(loaded: LoadedModel, layers: dict[str, Linear], section: ExportSection) -> _Plan:
    plan = _Plan(getattr(torch, section.dtype) if section.dtype else model_dtype(loaded))
    for name, layer in layers.items():
        if isinstance(layer, AdaptedLinear) and layer.quantizer is not None:
            plan.types[name] = type_of_grid(name, layer.quantizer, layer.in_features)
            plan.codes[name] = partial(_trained_codes, layer)
        elif isinstance(layer, AffineBase):
            plan.types[name] = type_of_base(name, layer)
            plan.codes[name] = layer.qtensor
    return plan


def _trained_codes(layer: AdaptedLinear) -> QTensor:
    codes = layer.quantized()
    assert codes is not None
    return codes


def _write(loaded: LoadedModel, family: GgufFamily, plan: _Plan, info: ExportInfo, folder: Path) -> Written:
    config: Any = loaded.model.config
    write_hf_files(loaded, folder, config=config, dtype=plan.dtype, tied=is_tied(loaded.model))
    entries = list(_entries(loaded, family, plan))
    writer = GGUFWriter(folder / FILE, MODEL_ARCH_NAMES[family.arch])
    try:
        writer.add_name(info.base)
        writer.add_file_type(_FILE_TYPES[_main_type(entries)])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        add_hyperparameters(writer, family, config)
        notes = add_tokenizer(writer, loaded.tokenizer, folder, vocab_size=config.vocab_size)
        for entry in entries:
            _announce(writer, entry)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.data())
    finally:
        writer.close()
    live = plan.dtype == model_dtype(loaded) and all(
        is_exact(layer, plan.dtype) for layer in linear_layers(loaded.model).values()
    )
    return Written(
        dtype=plan.dtype,
        bound=EXACT,
        exported_weight=None if live else partial(_exported_weight, plan),
        basis="original" if loaded.fusion is None else "fused",
        grids=tuple(_describe(type) for type in dict.fromkeys(plan.types.values())),
        notes=(*notes, *_notes(config)),
    )


def _main_type(entries: list[_Entry]) -> GGMLQuantizationType:
    """Return the type that holds most weights."""
    sizes: dict[GGMLQuantizationType, int] = {}
    for entry in entries:
        sizes[entry.type] = sizes.get(entry.type, 0) + int(np.prod(entry.shape))
    return max(sizes, key=lambda type: sizes[type])


def _announce(writer: GGUFWriter, entry: _Entry) -> None:
    shape = quant_shape_to_byte_shape(entry.shape, entry.type)
    writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=entry.type)


def _entries(loaded: LoadedModel, family: GgufFamily, plan: _Plan) -> Iterator[_Entry]:
    config = loaded.model.config
    names = get_tensor_name_map(family.arch, arch_of(config).num_layers)
    for name, part in model_parts(loaded.model):
        if name.endswith(_ROTARY_TABLE):
            continue
        rows = None if isinstance(part, Tensor) else row_order(family, config, name)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ExportError(
                f"{name}: llama.cpp's {MODEL_ARCH_NAMES[family.arch]} has no such tensor; export `merged`"
            )
        if isinstance(part, Tensor):
            shift = family.norm_shift if "norm" in name else 0.0
            yield _plain(target, name, partial(_shifted, part, shift), tuple(part.shape), plan.dtype)
            continue
        shape = (part.out_features, part.in_features)
        if name in plan.codes:
            yield _Entry(f"{target}.weight", shape, plan.types[name], partial(_packed, plan, name, rows))
        else:
            weight = partial(_in_order, partial(merged_weight, part, plan.dtype), rows)
            yield _plain(f"{target}.weight", name, weight, shape, plan.dtype)
        if part.bias is not None:
            bias = partial(_in_order, partial(_shifted, part.bias, 0.0), rows)
            yield _plain(f"{target}.bias", name, bias, tuple(part.bias.shape), plan.dtype)
    factors = rope_factors(config)
    if factors is not None:
        yield _plain("rope_freqs.weight", "rope_freqs", lambda: factors, tuple(factors.shape), torch.float32)


def _plain(target: str, name: str, tensor: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> _Entry:
    # ggml adds and multiplies vectors in fp32 only.
    stored = dtype if len(shape) > 1 else torch.float32
    return _Entry(target, shape, PLAIN_TYPES[stored], lambda: plain_bytes(to_dtype(name, tensor(), stored)))


def _shifted(tensor: Tensor, shift: float) -> Tensor:
    return tensor.float() + shift if shift else tensor


def _in_order(tensor: Callable[[], Tensor], rows: Tensor | None) -> Tensor:
    found = tensor()
    return found if rows is None else found[rows.to(found.device)]


def _packed(plan: _Plan, name: str, rows: Tensor | None) -> np.ndarray:
    blocks = packed_blocks(name, plan.codes[name](), plan.types[name])
    return blocks if rows is None else blocks[rows.numpy()]


def _exported_weight(plan: _Plan, name: str, layer: Linear) -> Tensor:
    return plan.codes[name]().dequantize(plan.dtype) if name in plan.codes else merged_weight(layer, plan.dtype)


def _describe(type: GGMLQuantizationType) -> dict[str, Any]:
    return {"kind": type.name.lower(), "bits": _BITS[type], "group_size": 32, "symmetric": True}


def _notes(config: Any) -> tuple[str, ...]:
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral" and window is not None and window < config.max_position_embeddings:
        return (f"llama.cpp attends to the whole context, where the model saw a window of {window} tokens",)
    return ()
