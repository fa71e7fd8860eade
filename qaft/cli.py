"""The command line: a verb parses its arguments and calls ``qaft.commands``; only verbs that need torch import it."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qaft.commands.merge_verb import verbs as merge_verbs
from qaft.commands.patch_verbs import verbs as patch_verbs
from qaft.errors import QaftError
from qaft.ranks import end_failed, join_launcher, lost_peer, rank, wait_for_launcher, world_size

if TYPE_CHECKING:
    from qaft.recipe import Recipe

app = typer.Typer(
    name="qaft",
    help="Fine-tune 4/8-bit language models through the quantizer they are served with, and export exactly that model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(merge_verbs)
app.add_typer(patch_verbs)

OVERRIDES: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipePath = Annotated[Path, typer.Argument(help="recipe (YAML) or run folder")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]

LISTS = ("updates", "quantizers", "rotations", "selectors", "sources", "regularizers", "exporters", "compat")


def overrides_from(arguments: list[str]) -> list[str]:
    """Return ``key=value`` for each of ``key=value``, ``--key=value``, ``--key value``."""
    result: list[str] = []
    pending = list(arguments)
    while pending:
        text = pending.pop(0)
        if text.startswith("--") and "=" not in text and pending and not pending[0].startswith("--"):
            text = f"{text}={pending.pop(0)}"
        result.append(text)
    return result


def _load(path: Path, context: typer.Context, *more: str) -> Recipe:
    # Before torch is imported: a mistake in a recipe is answered at once.
    from qaft.recipe import load_recipe

    return load_recipe(path, [*overrides_from(context.args), *more])


@app.command(context_settings=OVERRIDES)
def train(
    context: typer.Context,
    recipe: RecipePath,
    deepspeed: Annotated[str | None, typer.Option(help="train.deepspeed: zero2, zero3_offload, ..., or a file")] = None,
    # What launchers put before the arguments; most of them say the same in the environment.
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
    debug: Debug = False,
) -> None:
    """Train RECIPE [key=value ...], then write its exports."""
    if local_rank is not None and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    join_launcher()
    resolved = _load(recipe, context, *([] if deepspeed is None else [f"train.deepspeed={deepspeed}"]))
    from qaft.commands.train import train_and_export

    train_and_export(resolved)


@app.command(context_settings=OVERRIDES)
def data(context: typer.Context, recipe: RecipePath, samples: int = 3, debug: Debug = False) -> None:
    """Show samples with their trained tokens marked, lengths, truncation and duplicates."""
    resolved = _load(recipe, context)
    from qaft.commands.data import show_data

    show_data(resolved, samples=samples)


@app.command(context_settings=OVERRIDES)
def rotate(
    context: typer.Context,
    recipe: RecipePath,
    out: Annotated[Path | None, typer.Option(help="folder of rotations.json and .png; default: train.output")] = None,
    debug: Debug = False,
) -> None:
    """Measure quantization errors with and without each rotation, layer by layer, and print which to use."""
    resolved = _load(recipe, context)
    from rich.console import Console

    from qaft.commands.rotate import measure_recipe

    measure_recipe(resolved, Console(), out=out)


@app.command(context_settings=OVERRIDES)
def plan(
    context: typer.Context,
    recipe: RecipePath,
    world: Annotated[int, typer.Option(min=1, help="processes that train together")] = 1,
    debug: Debug = False,
) -> None:
    """Show the memory of each process under every DeepSpeed configuration, from shapes alone."""
    resolved = _load(recipe, context)
    from qaft.commands.plan import print_plan

    print_plan(resolved, world_size=world)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="run folder; it may still be training")],
    out: Annotated[Path | None, typer.Option(help="the picture; default: report.png in the run folder")] = None,
    debug: Debug = False,
) -> None:
    """Draw loss and quantization errors of a run, over time and layer by layer."""
    from rich.console import Console

    from qaft.commands.report import report_run

    report_run(run, Console(), out=out)


@app.command(name="eval", context_settings=OVERRIDES)
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="run folder, exported folder, base checkpoint or id")],
    data: Annotated[str | None, typer.Option(help="evaluation data; default: the run's data.valid")] = None,
    metrics: Annotated[str, typer.Option(help="comma-separated: perplexity, accuracy, exact_match")] = "perplexity",
    tasks: Annotated[str | None, typer.Option(help="comma-separated lm-eval tasks (extra: qaft[eval])")] = None,
    limit: Annotated[int | None, typer.Option(help="rows")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens generated per row for exact_match")] = 128,
    debug: Debug = False,
) -> None:
    """Measure perplexity, verbalizer accuracy, exact match or lm-eval tasks; data.* overrides are accepted."""
    from qaft.commands.evaluate import evaluate_model

    evaluate_model(
        model,
        overrides_from(context.args),
        data=data,
        metrics=metrics.split(","),
        tasks=tasks.split(",") if tasks else [],
        limit=limit,
        max_new_tokens=max_new_tokens,
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="run folder; with --check-only an exported folder")],
    format: Annotated[str | None, typer.Option("--format", "-f", help="see qaft list exporters")] = None,
    out: Annotated[Path | None, typer.Option(help="folder; default: RUN/export-FORMAT")] = None,
    force: Annotated[bool, typer.Option(help="overwrite, and write although the update does not survive")] = False,
    dtype: Annotated[str | None, typer.Option(help="dtype of merged weights")] = None,
    basis: Annotated[str, typer.Option(help="merged: fused | original")] = "fused",
    profile: Annotated[str, typer.Option(help="compressed-tensors: portable | vllm (with R4)")] = "portable",
    rank: Annotated[int | None, typer.Option(help="peft: cut a dense update to this rank")] = None,
    check_only: Annotated[bool, typer.Option(help="write nothing: is this export still what was exported?")] = False,
    base: Annotated[Path | None, typer.Option(help="with --check-only, for adapters: folder of the base model")] = None,
    debug: Debug = False,
) -> None:
    """Write a checkpoint of RUN, reload it in a fresh process, and refuse to call it done when it differs."""
    from rich.console import Console

    from qaft.commands.export import check_exported, export_run_folder

    if check_only:
        check_exported(run, base=base, console=Console())
        return
    if format is None:
        raise typer.BadParameter("give one (see qaft list exporters), or --check-only", param_hint="--format")
    options: dict[str, Any] = {"format": format, "force": force, "basis": basis, "profile": profile}
    options |= {"out": str(out)} if out else {}
    options |= {"dtype": dtype} if dtype else {}
    options |= {} if rank is None else {"rank": rank}
    export_run_folder(run, options)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="run folder, exported folder, base checkpoint or id")],
    b: Annotated[str, typer.Argument(help="what to compare it with")],
    prompts: Annotated[
        Path | None, typer.Option(help="text file, one prompt a line; default: built-in prompts")
    ] = None,
    gate: Annotated[float | None, typer.Option(help="largest relative logit difference; above it exit with 5")] = None,
    debug: Debug = False,
) -> None:
    """Compare the logits of two models on the same prompts; exit with 5 when B, an export of the run A, is not A."""
    from qaft.commands.diff import diff_models

    diff_models(a, b, prompts=prompts, gate=gate)


@app.command()
def replay(
    journal: Annotated[Path, typer.Argument(help="journal.jsonl, or the run folder that holds it")],
    base: Annotated[str, typer.Option(help="folder or id of the base model")],
    out: Annotated[Path, typer.Option(help="new run folder")],
    until: Annotated[int | None, typer.Option(help="steps; default: all")] = None,
    snapshot: Annotated[Path | None, typer.Option(help="checkpoint to begin from")] = None,
    shuffle: Annotated[int | None, typer.Option(help="seed: permute the scalars, as a control")] = None,
    debug: Debug = False,
) -> None:
    """Rebuild what a zeroth-order run has trained from its journal, bit for bit, without data."""
    from qaft.commands.replay import replay_journal

    replay_journal(journal, base=base, out=out, until=until, snapshot=snapshot, shuffle=shuffle)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="run folder, exported folder, base checkpoint or id")],
    max_new_tokens: int = 256,
    debug: Debug = False,
) -> None:
    """Talk to a model (greedy); an empty line ends."""
    from qaft.commands.chat import chat_with

    chat_with(model, max_new_tokens=max_new_tokens)


@app.command(name="list")
def list_parts(what: Annotated[str, typer.Argument(help=" | ".join(LISTS))], debug: Debug = False) -> None:
    """List what a recipe can name, with options and defaults."""
    from qaft.commands.listing import print_list

    print_list(what)


@app.command()
def schema(debug: Debug = False) -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from qaft.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 ok, 1 failure, 2 usage, 4 data, 5 comparison failed, 130/143 by a signal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not sys.stderr.isatty():
        # Libraries draw bars that fill a log file with thousands of lines.
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app(args=arguments)
    except Exception as error:
        wait_for_launcher(error)
        code = getattr(error, "exit_code", 1)
        if "--debug" in arguments or not (isinstance(error, (QaftError, OSError, MemoryError)) or lost_peer(error)):
            traceback.print_exc()
        else:
            where = f"rank {rank()}: " if world_size() > 1 else ""
            print(f"{where}{type(error).__name__}: {describe(error)}", file=sys.stderr)
        end_failed(code)


def describe(error: Exception) -> str:
    """Return the message of an error as a user can act on it, in one line."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"the disk is full ({error.filename or 'while writing'}); free space and run again: saved files are intact"
        )
    text = " ".join(str(error).split()) or type(error).__name__
    return f"lost another rank of the job, whose own message says why ({text})" if lost_peer(error) else text
