"""``qaft export``: write a run in a format, verified by a reload in a fresh process."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from qaft.build import Run, default_device, restore_run
from qaft.commands.memory import evaluation_memory, loading_memory
from qaft.errors import RecipeError
from qaft.evaluate.difference import difference_table
from qaft.export import EXPORTERS, ExportInfo, ExportReport
from qaft.export.check import check_export_folder
from qaft.export.folded import serving_form
from qaft.export.staging import require_free
from qaft.export.tensors import require_plain_options
from qaft.recipe import Recipe, parse_recipe
from qaft.registry import suggest
from qaft.sections import ExportSection
from qaft.train.log import METRICS


def export_run_folder(folder: Path, options: Mapping[str, Any]) -> ExportReport:
    """Restore a run from its folder and export it; ``options`` are those of the recipe's export section.

    Raises:
        RecipeError: an option or the format is wrong, or the format cannot hold this run.
        ExportError, DifferenceError: see ``export_run``.
    """
    with loading_memory({"model": folder}):
        run = restore_run(folder)
    # Through the parser, so that what physics forbids is refused here as in a recipe.
    recipe = parse_recipe({**run.recipe.dump(), "export": [dict(options)]}, source="qaft export")
    return export_run(run, recipe.export[0], Console())


def check_exported(folder: Path, *, base: Path | None, console: Console) -> None:
    """Print that an exported folder still is what was exported.

    Raises:
        ExportError, DifferenceError: see ``check_export_folder``.
    """
    found = check_export_folder(folder, base=base, device=default_device())
    patched = f" and patched ({', '.join(found.patches)})" if found.patches else ""
    lines = [f"{folder}: {found.format}, {found.num_files} files as they were exported{patched}"]
    if found.deviation is None:
        lines.append(f"logits: not compared, {found.uncompared}")
    else:
        lines.append(
            f"logits of a fresh process on {found.deviation.num_tokens} tokens: max relative difference "
            f"{found.deviation.max_relative:.1e}, KL {found.deviation.kl_mean:.1e} nats, same top token "
            f"{found.deviation.top1_agreement:.1%} ({found.bound.reason})"
        )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def check_export(recipe: Recipe, section: ExportSection) -> Path:
    """Return the folder of an export that can be written as far as the recipe alone tells.

    Raises:
        RecipeError: the format is not known, or does not take an option.
        ExportError: the folder exists.
    """
    if section.format not in EXPORTERS:
        raise RecipeError(
            f"export.format={section.format!r}: must be one of {', '.join(EXPORTERS)}"
            f"{suggest(section.format, dict(EXPORTERS))}"
        )
    if section.format != "merged":
        require_plain_options(section)
    if section.format != "peft" and section.rank is not None:
        raise RecipeError(f"export.rank={section.rank} applies to format peft only; leave it out for {section.format}")
    out = Path(section.out or Path(recipe.train.output, f"export-{section.format}"))
    require_free(out, force=section.force)
    return out


def export_run(run: Run, section: ExportSection, console: Console) -> ExportReport:
    """Write one export of a trained run and report what was measured.

    Raises:
        RecipeError: the format is not known.
        ExportError: the folder exists, or the format cannot hold this run.
        DifferenceError: the reloaded export is not the trained model.
    """
    out = check_export(run.recipe, section)
    info = ExportInfo(
        recipe=run.recipe.dump(),
        base=run.recipe.model.name,
        command=shlex.join(["qaft", *sys.argv[1:]]),
        metrics=last_metrics(run.folder),
    )
    run.loaded.model.eval()
    with evaluation_memory(f"exporting {out}", {}), serving_form(run.loaded, section) as notes:
        report = EXPORTERS[section.format](run.loaded, section, out, replace(info, notes=notes))
    mebibytes = sum(report.sizes.values()) / 2**20
    console.print(f"exported {section.format}: {report.folder} ({mebibytes:.1f} MiB)", highlight=False, soft_wrap=True)
    if report.difference is not None:
        console.print(difference_table(report.difference, a="trained", b="reloaded export"))
    if report.rounding is not None:
        console.print(
            f"what the file holds differs from the run itself: KL {report.rounding.kl_mean:.2e} nats per token, "
            f"max relative {report.rounding.max_relative:.2e}",
            highlight=False,
            soft_wrap=True,
        )
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    return report


def last_metrics(folder: Path) -> dict[str, float]:
    """Return the newest value of each metric in a run's log, for the model card."""
    path = folder / METRICS
    if not path.is_file():
        return {}
    metrics: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        metrics |= {k: v for k, v in json.loads(line).items() if isinstance(v, (int, float))}
    return {k: metrics[k] for k in ("step", "loss", "eval_loss", "eval_perplexity") if k in metrics}
