"""Which storages and grids exclude each other."""

from __future__ import annotations

from qaft.compat.rule import Rule
from qaft.sections import CODE_BOOK_KINDS

_WITHOUT_INTEGERS = (*CODE_BOOK_KINDS, "mxfp4", "nvfp4")
"""Kinds of grids whose codes are no integers with a scale."""

GRIDS: tuple[Rule, ...] = (
    Rule(
        "int4 storage x grid without integers",
        lambda r: r.model.storage == "int4" and r.qat is not None and r.qat.weights.kind in _WITHOUT_INTEGERS,
        "storage int4 takes its grid from qat.weights, which holds no integers with a scale per group here",
        "set model.storage to nf4, fp4 or bf16, or qat.weights.kind to int, q4_0 or q8_0",
    ),
    Rule(
        "int4 storage x another bit width",
        lambda r: r.model.storage == "int4" and r.qat is not None and r.qat.weights.bits != 4,
        "storage int4 takes its grid from qat.weights, which has another width",
        "set qat.weights.bits to 4, or model.storage to int8_group (8 bits) or bf16",
    ),
    Rule(
        "double quantization x storage without block scales",
        lambda r: r.model.double_quant and r.model.storage not in CODE_BOOK_KINDS,
        "only nf4 and fp4 have block scales to quantize again",
        "set model.double_quant to false, or model.storage to nf4 or fp4",
    ),
    Rule(
        "activations of compressed-tensors x vllm target",
        lambda r: (
            r.qat is not None
            and r.qat.target == "vllm"
            and r.qat.activations is not None
            and r.qat.activations.function == "compressed-tensors"
        ),
        "the kernels of vLLM divide inputs by another scale, under which a tenth of the codes differ",
        "set qat.activations.function to vllm, or qat.target to portable",
    ),
)
"""Rules of ``model`` and ``qat``."""
