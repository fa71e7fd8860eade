"""From the sections of a recipe to the batches of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qaft.data.batches import AnySample, EvalBatches, MakeBatch, TrainBatches, make_batch
from qaft.data.load import Which, load_samples
from qaft.data.options import load_options
from qaft.data.options_batch import make_options_batch
from qaft.sections import DataSection, TrainSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train_batches(
    data: DataSection, train: TrainSection, tokenizer: PreTrainedTokenizerBase, *, rank: int = 0, world_size: int = 1
) -> TrainBatches:
    """Return the training batches of a recipe for one of ``world_size`` processes.

    Raises:
        RecipeError: data.train is not set, or batch_size is no multiple of world_size.
        DataError: the data cannot be used; the message names file and line.
    """
    samples, make = _samples(data, tokenizer, "train")
    return TrainBatches(
        samples,
        max_length=data.max_length,
        batch_size=train.batch_size,
        grad_accumulation=train.grad_accumulation,
        steps=train.steps,
        packing=data.packing,
        seed=train.seed,
        rank=rank,
        world_size=world_size,
        pad_id=_pad_id(tokenizer),
        make=make,
    )


def eval_batches(
    data: DataSection, train: TrainSection, tokenizer: PreTrainedTokenizerBase, *, rank: int = 0, world_size: int = 1
) -> EvalBatches | None:
    """Return the evaluation batches of a recipe, at most ``train.eval_batches``; None without validation data.

    Raises:
        RecipeError: batch_size is no multiple of world_size.
        DataError: the data cannot be used; the message names file and line.
    """
    if data.valid is None:
        return None
    samples, make = _samples(data, tokenizer, "valid")
    return EvalBatches(
        samples if train.eval_batches is None else samples[: train.eval_batches * train.batch_size],
        max_length=data.max_length,
        batch_size=train.batch_size,
        rank=rank,
        world_size=world_size,
        pad_id=_pad_id(tokenizer),
        make=make,
    )


def _samples(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, which: Which
) -> tuple[Sequence[AnySample], MakeBatch]:
    """Return the samples of a data set, and what makes batches of them."""
    if data.scores_options:
        return load_options(data, tokenizer, which).samples, make_options_batch
    return load_samples(data, tokenizer, which).samples, make_batch


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # Any id would do, because padding is masked by position and never by id.
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
