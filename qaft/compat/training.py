"""What cannot be trained together: gradient sources, regularizers, optimizers, ZeRO stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qaft.compat.rule import Rule
from qaft.zero import zero_stage

if TYPE_CHECKING:
    from qaft.recipe import Recipe
    from qaft.sections import KindSection

PARTITIONABLE = ("adamw", "multiplicative", "sgd")
"""Optimizers whose step of an element depends on that element alone."""

LOZO = ("lozo", "lozo_m")

FIRST_ORDER = ("backprop", "extragradient")
"""Gradient sources that back-propagate."""


def _is_partitioned(recipe: Recipe) -> bool:
    """Return whether DeepSpeed steps flat partitions instead of parameters (stages 1 to 3)."""
    return bool(zero_stage(recipe.train.deepspeed))


def _is_zeroth_order(recipe: Recipe) -> bool:
    return recipe.gradient.kind not in FIRST_ORDER


def _lacks_blocks(recipe: Recipe) -> bool:
    blocks, interval = recipe.update.options.get("blocks", 32), recipe.gradient.options.get("interval", 50)
    return isinstance(blocks, int) and isinstance(interval, int) and blocks * interval < recipe.train.steps


def _regularizers(recipe: Recipe, kind: str) -> list[KindSection]:
    return [section for section in recipe.regularize if section.kind == kind]


TRAINING: tuple[Rule, ...] = (
    Rule(
        "zeroth-order source x ZeRO 1 to 3",
        lambda r: _is_zeroth_order(r) and _is_partitioned(r),
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
        lambda r: _is_zeroth_order(r) and bool(r.regularize),
        "the probe runs beside the layers, where a penalty on parameters does not see it",
        "leave regularize out (optim.weight_decay pulls to the base model), or set gradient.kind to backprop",
    ),
    Rule(
        "optimizer that is not element by element x ZeRO 1 to 3",
        lambda r: r.optim.name not in PARTITIONABLE and _is_partitioned(r),
        "it would be stepped over flat partitions of many parameters, where rows, columns and blocks are others",
        "set optim.name to adamw, multiplicative or sgd, or train.deepspeed to zero0 or null",
    ),
    Rule(
        "multiplicative rule x updates",
        lambda r: r.optim.name == "multiplicative" and r.optim.additive == 0,
        "every update starts at 0, and a parameter that is 0 has no relative change",
        "set optim.additive above 0 (the hybrid rule), or optim.name to adamw",
    ),
    Rule(
        "extragradient x grad_accumulation",
        lambda r: r.gradient.kind == "extragradient" and r.train.grad_accumulation > 1,
        "each micro-batch would go ahead by its own share of the gradient, as far as there are micro-batches less",
        "set train.grad_accumulation to 1 and a larger train.batch_size, or gradient.kind to backprop",
    ),
    Rule(
        "extragradient x DeepSpeed",
        lambda r: r.gradient.kind == "extragradient" and r.train.deepspeed is not None,
        "it moves the parameters between two passes of a step, and the engine counts one pass a step",
        "set train.deepspeed to null, or gradient.kind to backprop",
    ),
    Rule(
        "extragradient x float16",
        lambda r: r.gradient.kind == "extragradient" and r.model.dtype == "float16",
        "the first of its two gradients passes the model without the engine's loss scale and underflows",
        "set model.dtype to bfloat16, or gradient.kind to backprop",
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
        "pace fast x data that is no classification set",
        lambda r: (
            r.data.classification is None and any(s.options.get("variant") == "fast" for s in _regularizers(r, "pace"))
        ),
        "it keeps a hidden state for every target of the training data from one epoch to the next",
        "set variant to lazy_half, which costs no more, or give data.classification",
    ),
    Rule(
        "loss of options x packing",
        lambda r: r.data.scores_options and r.data.packing,
        "the options of a classification row fill the row behind its prompt",
        "set data.packing to false, or data.classification.loss to answer",
    ),
    Rule(
        "loss of options x train_on all",
        lambda r: r.data.scores_options and r.data.train_on == "all",
        "what is trained is the choice between the options, and no token of the prompt carries loss",
        "set data.train_on to completion, or data.classification.loss to answer",
    ),
    Rule(
        "loss of options x pace or kl",
        lambda r: r.data.scores_options and bool(_regularizers(r, "pace") or _regularizers(r, "kl")),
        "they compare what two passes say after each token of an answer, and rows of options have no answer",
        "set data.classification.loss to answer, or use proximal or mpc",
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
        "entries chosen by gradient x zeroth-order source",
        lambda r: (
            r.update.kind == "sift" and r.update.options.get("choose", "gradient") == "gradient" and _is_zeroth_order(r)
        ),
        "choosing them back-propagates through the model, whose activations a zeroth-order run has no memory for",
        "set update.choose to magnitude or random, or gradient.kind to backprop",
    ),
)
"""Rules of ``gradient``, ``regularize``, ``optim`` and ``train``."""
