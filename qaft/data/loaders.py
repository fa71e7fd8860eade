"""From the sections of a recipe to the batches of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from qaft.data.batches import Batch, EvalBatches, TrainBatches
from qaft.data.load import load_samples
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
    return TrainBatches(
        load_samples(data, tokenizer, "train").samples,
        max_length=data.max_length,
        batch_size=train.batch_size,
        grad_accumulation=train.grad_accumulation,
        steps=train.steps,
        packing=data.packing,
        seed=train.seed,
        rank=rank,
        world_size=world_size,
        pad_id=_pad_id(tokenizer),
    )


def eval_batches(
    data: DataSection, train: TrainSection, tokenizer: PreTrainedTokenizerBase, *, rank: int = 0, world_size: int = 1
) -> EvalBatches | Sequence[Batch] | None:
    """Return the evaluation batches of a recipe, at most ``train.eval_batches``; None without validation data.

    Raises:
        RecipeError: batch_size is no multiple of world_size.
        DataError: the data cannot be used; the message names file and line.
    """
    if data.valid is None:
        return None
    batches = EvalBatches(
        load_samples(data, tokenizer, "valid").samples,
        max_length=data.max_length,
        batch_size=train.batch_size,
        rank=rank,
        world_size=world_size,
        pad_id=_pad_id(tokenizer),
    )
    return batches if train.eval_batches is None else list(islice(batches, train.eval_batches))


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # Any id would do, because padding is masked by position and never by id.
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
