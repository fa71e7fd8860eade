"""``qaft diff``: are two models the same function?"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from qaft.build import default_device
from qaft.commands.memory import evaluation_memory
from qaft.commands.open import open_model
from qaft.errors import DifferenceError
from qaft.evaluate.difference import PROMPTS, compare_logits, difference_table, logits_of, prompt_ids, read_prompts


def diff_models(a: str, b: str, *, prompts: Path | None, gate: float | None) -> None:
    """Print the difference of two models' logits on the same prompts, computed in fp32.

    Raises:
        DifferenceError: the largest relative difference is above ``gate``.
    """
    texts = PROMPTS if prompts is None else read_prompts(prompts)
    first = open_model(a)
    ids = prompt_ids(first.tokenizer, texts)
    with evaluation_memory(f"computing logits of {a}", {}):
        reference = logits_of(first.model, ids, device=default_device())
    del first
    second = open_model(b)
    with evaluation_memory(f"computing logits of {b}", {}):
        difference = compare_logits(reference, logits_of(second.model, ids, device=default_device()))
    Console().print(difference_table(difference, a=a, b=b))
    if gate is not None and not difference.max_relative <= gate:
        raise DifferenceError(f"{a} and {b} differ by {difference.max_relative:.3g} relative; the gate is {gate:.3g}")
