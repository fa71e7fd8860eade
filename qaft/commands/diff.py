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
from qaft.export.measured import Measured, compare_measured, measure, verdicts
from qaft.export.record import ExportRecord, read_record
from qaft.layers.activations import plain_activations


def diff_models(a: str, b: str, *, prompts: Path | None, gate: float | None) -> None:
    """Print the difference of two models' logits on the same prompts, computed in fp32.

    Of a run and an exported folder also the limits that the export had to keep, and whether they hold. Then activations
    are those that the export speaks of: its readers have no quantized KV cache.

    Raises:
        DifferenceError: ``b`` is an export of the run ``a`` and exceeds a limit of its format, or the largest relative
            difference is above ``gate``; other pairs of models have no limits to keep.
    """
    console = Console()
    texts = PROMPTS if prompts is None else read_prompts(prompts)
    first = open_model(a)
    record = None if first.run is None else read_record(Path(b))
    ids = prompt_ids(first.tokenizer, texts)
    with evaluation_memory(f"computing logits of {a}", {}), _as_exported(first, record):
        reference = _measure(first, ids, record, None)
    is_export = first.run is not None and record is not None and record.is_of(first.run.recipe.dump())
    del first
    second = open_model(b)
    with evaluation_memory(f"computing logits of {b}", {}):
        found = _measure(second, ids, record, reference)
    difference = compare_logits(reference.logits, found.logits)
    console.print(difference_table(difference, a=a, b=b))
    failures = []
    if record is not None:
        limits = verdicts(record, compare_measured(reference, found))
        lines = [_heading(record, is_export=is_export), *(f"  {limit}" for limit in limits)]
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
        broken = [limit.name for limit in limits if not limit.holds]
        if broken and is_export:
            failures.append(f"{b} is no more what {a} has exported: above its limits are {', '.join(broken)}")
    if gate is not None and not difference.max_relative <= gate:
        failures.append(f"{a} and {b} differ by {difference.max_relative:.3g} relative; the gate is {gate:.3g}")
    if failures:
        raise DifferenceError("; ".join(failures))


def _heading(record: ExportRecord, *, is_export: bool) -> str:
    if record.rounded:
        return f"bound of {record.format}: to the weights as it rounds them, which are not those of the run"
    unasked = "" if is_export else " (the folder is no export of this run, so nothing has to hold)"
    return f"bound of {record.format}: {record.bound.reason}{unasked}"


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
