"""The few pairs of choices that exclude each other, as one table with reasons; no pair-``if`` anywhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qaft.errors import IncompatibleError
from qaft.zero import zero_stage

if TYPE_CHECKING:
    from qaft.recipe import Recipe
    from qaft.sections import KindSection

PACKED_BNB = ("nf4", "fp4", "int8")
EXPORTABLE_BITS = (4, 8)


@dataclass(frozen=True)
class Rule:
    """One row: when it applies, why it does not work, what to do instead."""

    name: str
    applies: Callable[[Recipe], bool]
    reason: str
    instead: str


PARTITIONABLE = ("adamw", "sgd")
"""Optimizers whose step of an element depends on that element alone."""

LOZO = ("lozo", "lozo_m")

UNBOUNDED_RANK = ("dense", "gsoft", "ia3", "sift", "ssb", "ssl")
"""Updates that are no product of two thin factors."""

GRID_BITS = {"int4": 4, "int8_group": 8}
"""Bits of the storages on an affine grid; group size and zero points are those of ``qat.weights``."""


def _exports(recipe: Recipe, format: str) -> bool:
    return any(e.format == format for e in recipe.export)


def _requantizes(recipe: Recipe) -> bool:
    """Return whether a packed export is asked for without ``force``, or with it but without a grid to force onto."""
    has_grid = recipe.model.storage in GRID_BITS or (recipe.qat is not None and recipe.qat.weights.kind == "int")
    return any(e.format == "compressed-tensors" and not (e.force and has_grid) for e in recipe.export)


def _is_partitioned(recipe: Recipe) -> bool:
    """Return whether DeepSpeed steps flat partitions instead of parameters (stages 1 to 3)."""
    return bool(zero_stage(recipe.train.deepspeed))


def _lacks_blocks(recipe: Recipe) -> bool:
    blocks, interval = recipe.update.options.get("blocks", 32), recipe.gradient.options.get("interval", 50)
    return isinstance(blocks, int) and isinstance(interval, int) and blocks * interval < recipe.train.steps


def _regularizers(recipe: Recipe, kind: str) -> list[KindSection]:
    return [section for section in recipe.regularize if section.kind == kind]


def _has_mixed_zero_points(recipe: Recipe) -> bool:
    grid, bits = recipe.qat and recipe.qat.weights, GRID_BITS.get(recipe.model.storage)
    return grid is not None and grid.kind == "int" and not grid.symmetric and bits not in (None, grid.bits)


INCOMPATIBLE: tuple[Rule, ...] = (
    Rule(
        "bitsandbytes storage x compressed-tensors export",
        lambda r: r.model.storage in PACKED_BNB and _requantizes(r),
        "the frozen layers would be quantized a second time, onto another grid than the one they are trained on",
        "set model.storage to int4 or int8_group (the export's own grid), or export `merged` or `peft`",
    ),
    Rule(
        "adapter on a packed base x compressed-tensors export",
        lambda r: r.model.storage in GRID_BITS and r.qat is None and _requantizes(r),
        "merging an update that was not trained through the grid back onto it erases most of the update",
        "add a qat section (the update is then trained through the grid), or export `merged` or `peft`",
    ),
    Rule(
        "grid other than int x compressed-tensors export",
        lambda r: r.qat is not None and r.qat.weights.kind != "int" and _exports(r, "compressed-tensors"),
        "the packed format that is written holds affine integers only",
        "set qat.weights.kind to int, or export `merged`, whose 16-bit weights hold every grid's values",
    ),
    Rule(
        "quantized activations x compressed-tensors export",
        lambda r: r.qat is not None and r.qat.activations is not None and _exports(r, "compressed-tensors"),
        "the file would say that activations are 16 bits, and its readers would not quantize them as in training",
        "export `merged` (the trained weights, to be served with quantized activations), or leave qat.activations out",
    ),
    Rule(
        "unpackable bit width x compressed-tensors export",
        lambda r: (
            r.qat is not None
            and r.qat.weights.kind == "int"
            and r.qat.weights.bits not in EXPORTABLE_BITS
            and _exports(r, "compressed-tensors")
        ),
        "readers of the packed format support 4 and 8 bits",
        "set qat.weights.bits to 4 or 8, or export `merged`",
    ),
    Rule(
        "two grids with zero points x compressed-tensors export",
        lambda r: _has_mixed_zero_points(r) and _exports(r, "compressed-tensors"),
        "frozen and trained layers lie on grids of different widths, and of files with zero points transformers reads "
        "the first grid only",
        "set qat.weights.symmetric to true, or model.storage to int4 (bits 4), int8_group (bits 8) or bf16, or export "
        "`merged`",
    ),
    Rule(
        "int4 storage x grid other than int",
        lambda r: r.model.storage == "int4" and r.qat is not None and r.qat.weights.kind != "int",
        "storage int4 takes its grid from qat.weights, which holds no integers with a scale per group here",
        "set model.storage to nf4, or qat.weights.kind to int",
    ),
    Rule(
        "int4 storage x another bit width",
        lambda r: r.model.storage == "int4" and r.qat is not None and r.qat.weights.bits != 4,
        "storage int4 takes its grid from qat.weights, which has another width",
        "set qat.weights.bits to 4, or model.storage to int8_group (8 bits) or bf16",
    ),
    Rule(
        "zeroth-order source x ZeRO 1 to 3",
        lambda r: r.gradient.kind != "backprop" and _is_partitioned(r),
        "stage 3 leaves parameters empty outside of the forward pass, so that nothing of them can be probed, and every "
        "stage steps flat partitions, which no journal can repeat; there are no gradients to partition",
        "set train.deepspeed to zero0 or null (any launcher will do: ranks exchange a few scalars)",
    ),
    Rule(
        "lozo x update other than bank",
        lambda r: r.gradient.kind in LOZO and r.update.kind != "bank",
        "LOZO trains the blocks of a bank of fixed random subspaces",
        "set update to {kind: bank, rank: 2, blocks: 32}, or gradient.kind to spsa, which probes any update",
    ),
    Rule(
        "growing LOZO x too few blocks",
        lambda r: r.gradient.kind in LOZO and r.gradient.options.get("policy") == "growing" and _lacks_blocks(r),
        "each block is trained once, for gradient.interval steps, and the run is longer",
        "set update.blocks to at least train.steps / gradient.interval, or gradient.policy to bank",
    ),
    Rule(
        "zeroth-order source x regularize",
        lambda r: r.gradient.kind != "backprop" and bool(r.regularize),
        "the probe runs beside the layers, where a penalty on parameters does not see it",
        "leave regularize out (optim.weight_decay pulls to the base model), or set gradient.kind to backprop",
    ),
    Rule(
        "optimizer that is not element by element x ZeRO 1 to 3",
        lambda r: r.optim.name not in PARTITIONABLE and _is_partitioned(r),
        "it would be stepped over flat partitions of many parameters, where rows, columns and blocks are others",
        "set optim.name to adamw or sgd, or train.deepspeed to zero0 or null",
    ),
    Rule(
        "16-bit trained parameters x ZeRO 1 to 3",
        lambda r: r.train.param_dtype != "float32" and _is_partitioned(r),
        "DeepSpeed would step a copy in fp32, which is another training than without it, and save no memory",
        "set train.param_dtype to float32, or train.deepspeed to zero0 or null",
    ),
    Rule(
        "kl with teacher fp x no qat",
        lambda r: r.qat is None and any(s.options.get("teacher") == "fp" for s in _regularizers(r, "kl")),
        "without a qat section nothing is quantized that could be taken off; packed base weights stay as they are",
        "set teacher to base, or add a qat section",
    ),
    Rule(
        "pace x packing",
        lambda r: r.data.packing and bool(_regularizers(r, "pace")),
        "its noise is drawn for each sample, and packing puts several into one row",
        "set data.packing to false, or use kl",
    ),
    Rule(
        "pace x gradient checkpointing",
        lambda r: r.train.gradient_checkpointing and bool(_regularizers(r, "pace")),
        "what is computed again in the backward pass would have no noise",
        "set train.gradient_checkpointing to false (a smaller train.batch_size saves memory too), or use kl",
    ),
    Rule(
        "mpc x update without two trained factors",
        lambda r: r.update.kind not in ("lowrank", "linchain") and bool(_regularizers(r, "mpc")),
        "it keeps the factors A and B of a low-rank update near orthonormal",
        "set update.kind to lowrank or linchain, or use proximal",
    ),
    Rule(
        "mpc x ZeRO 3",
        lambda r: zero_stage(r.train.deepspeed) == 3 and bool(_regularizers(r, "mpc")),
        "parameters are empty outside of the forward pass there",
        "set train.deepspeed to zero2 or null",
    ),
    Rule(
        "proximal x ZeRO 1 to 3",
        lambda r: _is_partitioned(r) and bool(_regularizers(r, "proximal")),
        "DeepSpeed steps flat partitions of many parameters there, not the parameters that are pulled",
        "set optim.weight_decay (the same pull for all that starts at 0), or train.deepspeed to zero0 or null",
    ),
    Rule(
        "update of any rank x peft export",
        lambda r: r.update.kind in UNBOUNDED_RANK and _exports(r, "peft"),
        "a LoRA file holds updates of bounded rank only",
        "export `merged` (or `compressed-tensors` with qat), or set update.kind to lowrank, linchain, roco or bank",
    ),
    Rule(
        "tied scalings x zeroth-order source",
        lambda r: r.update.kind == "ssb" and bool(r.update.options.get("tie")) and r.gradient.kind != "backprop",
        "a probe moves the parameters of one layer, and tied layers share theirs",
        "set update.tie to false, or gradient.kind to backprop",
    ),
    Rule(
        "entries chosen by gradient x zeroth-order source",
        lambda r: (
            r.update.kind == "sift"
            and r.update.options.get("choose", "gradient") == "gradient"
            and r.gradient.kind != "backprop"
        ),
        "choosing them back-propagates through the model, whose activations a zeroth-order run has no memory for",
        "set update.choose to magnitude or random, or gradient.kind to backprop",
    ),
    Rule(
        "double quantization x storage without block scales",
        lambda r: r.model.double_quant and r.model.storage not in ("nf4", "fp4"),
        "only nf4 and fp4 have block scales to quantize again",
        "set model.double_quant to false, or model.storage to nf4 or fp4",
    ),
    Rule(
        "simulation target x export",
        lambda r: r.qat is not None and r.qat.target == "simulation" and bool(r.export),
        "with this target the model may rotate activations in ways that no program that loads an export does",
        "set qat.target to portable or vllm, or leave out export",
    ),
    Rule(
        "online rotation of down x export",
        lambda r: (
            r.qat is not None
            and r.qat.target == "vllm"
            and r.qat.activations is not None
            and r.qat.rotation != "none"
            and bool(r.export)
        ),
        "no exporter here writes the input transform of down_proj, and transformers would ignore it",
        "set qat.target to portable",
    ),
)

CAUTIONS: tuple[Rule, ...] = (
    Rule(
        "zeroth-order source x clipping",
        lambda r: r.gradient.kind != "backprop" and r.optim.clip is not None and r.optim.name == "sgd",
        "the norm of an estimate is |c| times the root of the number of parameters probed, far above optim.clip="
        "1: every step would have the same length",
        "set optim.clip to null; gradient.outlier masks what is too large",
    ),
    Rule(
        "dense update x lr_scale >= 2",
        lambda r: r.update.kind == "dense" and any(v >= 2 for v in r.optim.lr_scale.values()),
        "full QV updates collapse at ratios of 2 and more (arXiv 2410.02247, table 2)",
        "use a factor of 1 for dense updates; 4 is the paper's choice for lowrank",
    ),
)


def check_compatible(recipe: Recipe) -> None:
    """Raise for the first incompatibility that applies.

    Raises:
        IncompatibleError: the message holds the reason and the ways out.
    """
    for row in INCOMPATIBLE:
        if row.applies(recipe):
            raise IncompatibleError(f"{row.name}: {row.reason}; {row.instead}")


def cautions(recipe: Recipe) -> list[str]:
    """Return what is legal but known to go wrong, with the remedy."""
    return [f"{row.name}: {row.reason}; {row.instead}" for row in CAUTIONS if row.applies(recipe)]
