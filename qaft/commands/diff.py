"""``qaft diff``: are two models the same function?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from qaft.build import default_device
from qaft.commands.memory import evaluation_memory
from qaft.commands.open import OpenedModel, open_model
from qaft.errors import DifferenceError
from qaft.evaluate.difference import PROMPTS, compare_logits, difference_table, logits_of, prompt_ids, read_prompts
from qaft.export.activations import plain_activations
from qaft.export.measured import Measured, compare_measured, measure, verdicts
from qaft.export.record import ExportRecord, read_record


def diff_models(a: str, b: str, *, prompts: Path | None, gate: float | None) -> None:
    """Print the difference of two models' logits on the same prompts, computed in fp32.

    Of a run and an exported folder also the bound that the export had to keep, and whether it holds. Then activations
    are those that the export speaks of: its readers have no quantized KV cache.

    Raises:
        DifferenceError: the largest relative difference is above ``gate``.
    """
    console = Console()
    texts = PROMPTS if prompts is None else read_prompts(prompts)
    first = open_model(a)
    record = None if first.run is None else read_record(Path(b))
    ids = prompt_ids(first.tokenizer, texts)
    with evaluation_memory(f"computing logits of {a}", {}), _as_exported(first, record):
        reference = _measure(first, ids, record, None)
    del first
    second = open_model(b)
    with evaluation_memory(f"computing logits of {b}", {}):
        found = _measure(second, ids, record, reference)
    difference = compare_logits(reference.logits, found.logits)
    console.print(difference_table(difference, a=a, b=b))
    if record is not None:
        lines = verdicts(record, compare_measured(reference, found))
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
    if gate is not None and not difference.max_relative <= gate:
        raise DifferenceError(f"{a} and {b} differ by {difference.max_relative:.3g} relative; the gate is {gate:.3g}")


@contextmanager
def _as_exported(opened: OpenedModel, record: ExportRecord | None) -> Iterator[None]:
    if record is None:
        yield
        return
    with plain_activations(opened.model, keep_inputs=record.inputs is not None):
        yield


def _measure(
    opened: OpenedModel, ids: tuple[torch.Tensor, ...], record: ExportRecord | None, reference: Measured | None
) -> Measured:
    if record is None:
        return Measured(logits_of(opened.model, ids, device=default_device()))
    return measure(opened.model, ids, inputs=None if reference is None else reference.inputs)
