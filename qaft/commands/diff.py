"""``qaft diff``: are two models the same function?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from qaft.build import default_device
from qaft.commands.memory import evaluation_memory
from qaft.commands.open import OpenedModel, open_model, require_whole
from qaft.errors import DifferenceError
from qaft.evaluate.difference import PROMPTS, compare_logits, difference_table, logits_of, prompt_ids, read_prompts
from qaft.export.check import Expected, expected_of
from qaft.export.fingerprint import Fingerprint
from qaft.export.measured import Measured, Verdict, compare_measured, logit_verdicts, measure, verdicts
from qaft.export.record import ExportRecord, read_record
from qaft.layers.activations import plain_activations


def diff_models(a: str, b: str, *, prompts: Path | None, gate: float | None) -> None:
    """Print the difference of two models' logits on the same prompts, computed in fp32.

    Of a run and an exported folder also the limits that the export had to keep, and whether they hold. Then activations
    are those that the export speaks of: its readers have no quantized KV cache. An export that rounds the weights of
    the run is held to what the rounded ones have answered when it was written.

    Raises:
        DifferenceError: ``b`` is an export of the run ``a`` and exceeds a limit of its format, or the largest relative
            difference is above ``gate``; other pairs of models have no limits to keep.
        ModelError: one of them cannot be loaded.
    """
    console = Console()
    require_whole(b)
    texts = PROMPTS if prompts is None else read_prompts(prompts)
    first = open_model(a)
    record = None if first.run is None else read_record(Path(b))
    ids = prompt_ids(first.tokenizer, texts)
    with evaluation_memory(f"computing logits of {a}", {}), _as_exported(first, record):
        reference = _measure(first, ids, record, None)
    is_export = first.run is not None and record is not None and record.is_of(first.run.recipe.dump())
    del first
    second = open_model(b, exact=True)
    with evaluation_memory(f"computing logits of {b}", {}):
        found = _measure(second, ids, record, reference)
    difference = compare_logits(reference.logits, found.logits)
    console.print(difference_table(difference, a=a, b=b))
    failures = []
    if record is not None:
        lines, limits = [_heading(record, is_export=is_export)], []
        if not record.rounded:
            limits = verdicts(record.bound, compare_measured(reference, found))
        elif (expected := expected_of(Path(b))).answers is None:
            lines.append(f"  not compared: {expected.why_not}")
        else:
            limits = _rounded_verdicts(second, expected, expected.answers)
        lines += [f"  {limit}" for limit in limits]
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
        broken = [limit.name for limit in limits if not limit.holds]
        if broken and is_export:
            failures.append(f"{b} is no more what {a} has exported: above its limits are {', '.join(broken)}")
    if gate is not None and not difference.max_relative <= gate:
        failures.append(f"{a} and {b} differ by {difference.max_relative:.3g} relative; the gate is {gate:.3g}")
    if failures:
        raise DifferenceError("; ".join(failures))


def _heading(record: ExportRecord, *, is_export: bool) -> str:
    unasked = "" if is_export else " (the folder is no export of this run, so nothing has to hold)"
    rounded = "to the weights as it rounds them, which are not those of the run"
    return f"bound of {record.format}: {rounded if record.rounded else record.bound.reason}{unasked}"


def _rounded_verdicts(opened: OpenedModel, expected: Expected, answers: Fingerprint) -> list[Verdict]:
    """Return a verdict for every limit to the recorded answers: the rounded weights are in no run to compare with."""
    device = default_device()
    with evaluation_memory(f"computing logits of {opened.name}", {}):
        found = logits_of(opened.model, answers.ids, device=device)
    return logit_verdicts(expected.on(device), answers.compare(found))


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
